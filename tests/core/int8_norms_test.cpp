// Norms that write int8 on the CPU, against the two calls that they stand for and a float64 reference.
#include "int8_norms_fixture.h"

#include "halfstep/status.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::Int8NormResult;
using test::NormCase;
using test::NormData;

NormForward forward(NormData& data) {
  const std::vector<TensorView> views = data.tensors.views();
  return {data.test_case.shape,
          data.test_case.center,
          test::kNormEps,
          views[NormData::kInput],
          views[NormData::kWeight],
          views[NormData::kBias],
          views[NormData::kOut],
          nullptr,
          nullptr};
}

// A NaN is no result that could be compared.
Int8NormResult comparable(Int8NormResult result) {
  for (float& scale : result.scales)
    if (std::isnan(scale)) scale = -1.0F;
  return result;
}

Int8NormResult fused(NormData& data, const Int8Parameters& parameters, bool by_rows, bool keep_float,
                     const Executor& executor = SerialExecutor()) {
  Int8NormResult result(data.test_case.shape, by_rows);
  Int8Norm call{forward(data), result.quantized.data(), parameters, by_rows ? result.scales.data() : nullptr};
  if (!keep_float) call.norm.out.data = nullptr;
  cpu::normalize_int8(call, executor);
  return comparable(result);
}

Int8NormResult composed(NormData& data, const Int8Parameters& parameters, bool by_rows) {
  Int8NormResult result(data.test_case.shape, by_rows);
  const NormForward call = forward(data);
  cpu::normalize(call, SerialExecutor());
  if (by_rows) {
    cpu::quantize_rows(call.out, {}, call.shape.rows, result.quantized.data(), result.scales.data(), SerialExecutor());
  } else {
    cpu::quantize(call.out, {}, parameters, result.quantized.data(), SerialExecutor());
  }
  return comparable(result);
}

void expect_same_floats(NormData& one, NormData& other) {
  const auto bytes =
      static_cast<std::size_t>(one.test_case.shape.rows * one.test_case.shape.channels) * size_of(one.test_case.out);
  if (bytes == 0) return;
  EXPECT_EQ(std::memcmp(forward(one).out.data, forward(other).out.data, bytes), 0);
}

TEST(Int8Norms, AreANormAndAQuantizationBitForBitAndNearTheReference) {
  for (const NormCase& c : test::int8_norm_cases()) {
    const Int8Parameters parameters = test::int8_norm_parameters(c);
    for (const bool by_rows : {false, true}) {
      SCOPED_TRACE(testing::Message() << c << ", by rows " << by_rows);
      NormData in_two(c);
      NormData in_one(c);
      NormData without_floats(c);
      const Int8NormResult expected = composed(in_two, parameters, by_rows);
      const Int8NormResult got = fused(in_one, parameters, by_rows, /*keep_float=*/true);
      ASSERT_EQ(got, expected);
      ASSERT_EQ(fused(without_floats, parameters, by_rows, /*keep_float=*/false), expected);
      expect_same_floats(in_one, in_two);
      test::expect_int8_norm_matches(in_one, got, parameters);
      if (testing::Test::HasFailure()) return;
      for (std::size_t i = 0; i < got.quantized.size(); ++i)
        ASSERT_EQ(without_floats.tensors.get(NormData::kOut, i), -7.0) << "written, but not wanted";
    }
  }
}

TEST(Int8Norms, TheSameBitsWhateverTheThreads) {
  for (const NormShape& shape : {NormShape{1000, 100}, NormShape{33, 9000}}) {
    for (const bool by_rows : {false, true}) {
      NormData serial({.shape = shape});
      NormData threaded({.shape = shape});
      EXPECT_EQ(fused(serial, {0.03F, 5}, by_rows, true),
                fused(threaded, {0.03F, 5}, by_rows, true, test::ThreadedExecutor()));
      expect_same_floats(serial, threaded);
    }
  }
}

TEST(Int8Norms, ParametersAndStatisticsMayBeAbsent) {
  const NormCase c{.shape = {5, 100}, .input = DType::kFloat32, .out = DType::kFloat32};
  NormData neutral(c);
  for (std::size_t i = 0; i < 100; ++i) {
    neutral.tensors.set(NormData::kWeight, i, 1.0);
    neutral.tensors.set(NormData::kBias, i, 0.0);
  }
  NormData absent(c);
  Int8NormResult result(c.shape, false);
  Int8Norm call{forward(absent), result.quantized.data(), {0.03F, -4}};
  call.norm.weight = call.norm.bias = {};
  std::vector<float> mean(5, -7.0F);
  std::vector<float> rstd(5, -7.0F);
  call.norm.mean = mean.data();
  call.norm.rstd = rstd.data();
  cpu::normalize_int8(call, SerialExecutor());
  EXPECT_EQ(result, composed(neutral, {0.03F, -4}, false));
  for (std::size_t row = 0; row < 5; ++row) {
    EXPECT_NEAR(mean[row], 0.0, 0.5);
    EXPECT_NEAR(rstd[row], 1.0, 0.3);
  }
}

TEST(Int8Norms, NonFiniteRowsStayAmongThemselves) {
  for (const std::int64_t cols : {100, 5000})
    test::check_non_finite_rows(cols, [](auto&&... arguments) { return fused(arguments...); }, &composed);
}

TEST(Int8Norms, RefuseWhatTheyCannotQuantizeBy) {
  NormData data({.shape = {2, 8}});
  EXPECT_THROW(fused(data, {0.0F, 0}, false, true), InvalidArgument);
  EXPECT_THROW(fused(data, {std::numeric_limits<float>::quiet_NaN(), 0}, false, true), InvalidArgument);
  EXPECT_THROW(fused(data, {1.0F, 128}, false, true), InvalidArgument);
  NormData images({.shape = {4, 3, 5, 2}});
  EXPECT_THROW(fused(images, {}, false, true), InvalidArgument);
}

}  // namespace
}  // namespace halfstep
