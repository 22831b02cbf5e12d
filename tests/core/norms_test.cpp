// The CPU norms against a float64 reference.
#include "halfstep/norms.h"

#include <limits>

#include "norm_fixture.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::NormCase;
using test::NormData;
using test::NormResult;

NormResult run(NormData& data, const Executor& executor = SerialExecutor()) {
  const NormCase& c = data.test_case;
  NormResult result(c.shape);
  const std::vector<TensorView> views = data.tensors.views();
  float* const mean = c.center ? result.mean.data() : nullptr;
  cpu::normalize({c.shape, c.center, test::kNormEps, views[NormData::kInput], views[NormData::kWeight],
                  views[NormData::kBias], views[NormData::kOut], mean, result.rstd.data()},
                 executor);
  cpu::normalize_backward(
      {c.shape, c.center, views[NormData::kGradOut], views[NormData::kInput], views[NormData::kWeight], mean,
       result.rstd.data(), views[NormData::kGradInput].data, result.grad_weight.data(), result.grad_bias.data()},
      executor);
  return result;
}

TEST(Norms, AgreeWithTheReferenceForAllShapesAndDtypes) {
  for (const NormCase& c : test::norm_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    NormData data(c);
    const NormResult result = run(data);
    test::expect_norm_matches(data, result);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Norms, TheSameBitsWhateverTheThreads) {
  for (const NormShape& shape : {NormShape{1000, 100}, NormShape{33, 9000}, NormShape{64, 4, 500, 8}}) {
    NormData serial({.shape = shape});
    NormData threaded({.shape = shape});
    EXPECT_EQ(run(serial), run(threaded, test::ThreadedExecutor()));
    for (const std::size_t tensor : {NormData::kOut, NormData::kGradInput}) {
      const auto bytes = static_cast<std::size_t>(shape.rows * shape.cols()) * 2;
      EXPECT_EQ(std::memcmp(serial.tensors.views()[tensor].data, threaded.tensors.views()[tensor].data, bytes), 0);
    }
  }
}

TEST(Norms, AbsentParametersCountAsOneAndZeroAndNullGradientsStayUncomputed) {
  NormData data({.shape = {5, 100}});
  NormData plain({.shape = {5, 100}});
  for (std::size_t i = 0; i < 100; ++i) {
    data.tensors.set(NormData::kWeight, i, 1.0);
    data.tensors.set(NormData::kBias, i, 0.0);
  }
  NormResult expected = run(data);
  NormResult got(data.test_case.shape);
  const std::vector<TensorView> views = plain.tensors.views();
  const TensorView none{};
  cpu::normalize({{5, 100},
                  true,
                  test::kNormEps,
                  views[NormData::kInput],
                  none,
                  none,
                  views[NormData::kOut],
                  got.mean.data(),
                  got.rstd.data()},
                 SerialExecutor());
  NormBackward backward{{5, 100},
                        true,
                        views[NormData::kGradOut],
                        views[NormData::kInput],
                        none,
                        got.mean.data(),
                        got.rstd.data(),
                        views[NormData::kGradInput].data,
                        nullptr,
                        nullptr};
  cpu::normalize_backward(backward, SerialExecutor());
  for (std::size_t i = 0; i < 500; ++i) {
    EXPECT_EQ(plain.tensors.get(NormData::kOut, i), data.tensors.get(NormData::kOut, i));
    EXPECT_EQ(plain.tensors.get(NormData::kGradInput, i), data.tensors.get(NormData::kGradInput, i));
  }
  backward.grad_input = nullptr;
  backward.grad_weight = got.grad_weight.data();
  backward.grad_bias = got.grad_bias.data();
  cpu::normalize_backward(backward, SerialExecutor());
  EXPECT_EQ(got, expected);
}

TEST(Norms, NonFiniteRowsStayAmongThemselves) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    NormData data({.shape = {3, 5000}});
    data.tensors.set(NormData::kInput, 5000 + 4999, bad);
    run(data);
    EXPECT_TRUE(std::isfinite(data.tensors.get(NormData::kOut, 4999)));
    EXPECT_TRUE(std::isnan(data.tensors.get(NormData::kOut, 5000 + 4999)));
    EXPECT_TRUE(std::isfinite(data.tensors.get(NormData::kOut, 10000)));
  }
}

}  // namespace
}  // namespace halfstep
