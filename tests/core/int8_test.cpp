// int8 linear layers of the CPU against the reference, bit for bit, with every instruction set of this processor.
#include "halfstep/int8.h"

#include "halfstep/status.h"
#include "int8_fixture.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::Int8Data;
using test::Int8Ending;
using test::Int8Fill;

std::vector<std::uint8_t> run(const Int8LinearShape& shape, const Int8Data& data, Int8Isa isa,
                              const Executor& executor = SerialExecutor()) {
  test::Int8Packed packed({shape.channels, shape.terms}, data.weight.data());
  std::vector<std::uint8_t> out = data.empty_out();
  cpu::int8_linear(shape, data.input.data(), packed.data(), data.epilogue(out.data()), isa, executor);
  return out;
}

void expect_matches(const Int8LinearShape& shape, const Int8Ending& ending, Int8Fill fill = Int8Fill::kRandom) {
  const Int8Data data(shape, ending, fill);
  for (const Int8Isa isa : test::int8_isas()) {
    SCOPED_TRACE(testing::Message() << shape.rows << " x " << shape.terms << " x " << shape.channels << ", isa "
                                    << static_cast<int>(isa) << ", " << ending);
    test::expect_int8_result(data, run(shape, data, isa));
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Int8Linear, SumsAreExactForEveryNumberOfRows) {
  for (std::int64_t rows = 0; rows <= 70; ++rows) {
    expect_matches({rows, 67, 37}, {.zero_point = static_cast<std::int32_t>(rows * 5 % 256 - 128)});
    expect_matches({rows, 520, 16}, {});
    if (HasFatalFailure()) return;
  }
  for (const std::int64_t rows : {95, 96, 97, 191, 200}) expect_matches({rows, 130, 70}, {.zero_point = 3});
}

TEST(Int8Linear, SumsAreExactAroundTheSizesOfBlocks) {
  for (const std::int64_t terms : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 511, 512, 513, 1027}) {
    for (const std::int64_t channels : {0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130}) {
      expect_matches({1, terms, channels}, {.zero_point = -128});
      expect_matches({9, terms, channels}, {.zero_point = 127});
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Int8Linear, SumsAreExactForEveryZeroPoint) {
  for (std::int32_t zero_point = -128; zero_point <= 127; ++zero_point) {
    expect_matches({7, 21, 19}, {.zero_point = zero_point});
    if (HasFatalFailure()) return;
  }
}

TEST(Int8Linear, SumsOfTheLargestTermsFit) {
  for (const Int8Fill fill : {Int8Fill::kLargest, Int8Fill::kSmallest, Int8Fill::kMixed}) {
    for (const std::int64_t rows : {1, 13}) {
      expect_matches({rows, 32768, 17}, {.zero_point = 127}, fill);
      expect_matches({rows, kInt8MaxTermsShifted, 17}, {.zero_point = 127}, fill);
      expect_matches({rows, kInt8MaxTermsShifted, 17}, {.zero_point = -128}, fill);
      expect_matches({rows, kInt8MaxTerms, 5}, {}, fill);
      if (HasFatalFailure()) return;
    }
  }
  const Int8LinearShape shape{1, kInt8MaxTermsShifted, 1};
  EXPECT_EQ(Int8Data(shape, {.zero_point = 127}, Int8Fill::kLargest).sums[0], kInt8MaxTermsShifted * 255 * 127);
}

// Contracts say -127 .. 127 of weights, but the kernels need not know.
TEST(Int8Linear, MinusTimesMinus128IsExact) {
  const Int8LinearShape shape{8, 1000, 16};
  Int8Data data(shape, {}, Int8Fill::kSmallest);
  std::fill(data.weight.begin(), data.weight.end(), std::int8_t{-128});
  std::fill(data.sums.begin(), data.sums.end(), 1000 * 128 * 128);
  for (const Int8Isa isa : test::int8_isas()) test::expect_int8_result(data, run(shape, data, isa));
}

TEST(Int8Linear, EveryEndingIsTheReferences) {
  for (const Int8Ending& ending : test::int8_endings()) {
    // The last: more channels than are finished at once. Those of 16 to 128: several rows are finished as one.
    for (const Int8LinearShape& shape :
         {Int8LinearShape{1, 40, 300}, Int8LinearShape{13, 70, 21}, Int8LinearShape{37, 9, 16},
          Int8LinearShape{101, 8, 64}, Int8LinearShape{5, 8, 128}, Int8LinearShape{3, 8, 2500}}) {
      expect_matches(shape, ending);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Int8Linear, TheSameBitsWhateverTheThreads) {
  const Int8Ending ending{.zero_point = 5, .bias = true, .kind = Int8OutKind::kFloat, .dtype = DType::kBFloat16};
  for (const Int8LinearShape& shape :
       {Int8LinearShape{1, 1024, 4100}, Int8LinearShape{300, 700, 200}, Int8LinearShape{70, 3000, 500}}) {
    const Int8Data data(shape, ending);
    for (const Int8Isa isa : test::int8_isas()) {
      test::expect_int8_result(data, run(shape, data, isa));
      EXPECT_EQ(run(shape, data, isa), run(shape, data, isa, test::ThreadedExecutor()));
    }
  }
}

// Counts what it is given.
class CountingExecutor final : public Executor {
 public:
  void for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    tasks += count;
    SerialExecutor().for_each(count, task);
  }
  mutable std::int64_t tasks = 0;
};

TEST(Int8Linear, OneRowIsWorkForSeveralThreadsAndSmallOnesForNone) {
  const Int8LinearShape large{1, 2048, 2048};
  const CountingExecutor executor;
  run(large, Int8Data(large, {}), cpu::best_int8_isa(), executor);
  EXPECT_GE(executor.tasks, 4);
  const Int8LinearShape small{4, 64, 64};
  const CountingExecutor idle;
  run(small, Int8Data(small, {}), cpu::best_int8_isa(), idle);
  EXPECT_EQ(idle.tasks, 0);
}

TEST(Int8Linear, RowsThatAreNotFiniteStayAmongThemselves) {
  const Int8LinearShape shape{3, 16, 20};
  Int8Data data(shape, {.row_scales = true, .kind = Int8OutKind::kFloat});
  data.row_scales[1] = std::numeric_limits<float>::quiet_NaN();
  for (const Int8Isa isa : test::int8_isas()) {
    const std::vector<std::uint8_t> out = run(shape, data, isa);
    for (std::int64_t i = 0; i < 60; ++i)
      EXPECT_EQ(std::isnan(test::load_float(DType::kFloat32, out.data(), i)), i >= 20 && i < 40) << i;
  }
}

TEST(Int8Linear, RefusesWhatItCannotCompute) {
  const Int8LinearShape shape{2, 8, 16};
  const Int8Data data(shape, {.kind = Int8OutKind::kFloat});
  test::Int8Packed packed({16, 8}, data.weight.data());
  std::vector<std::uint8_t> out = data.empty_out();
  const auto expect_refused = [&](Int8LinearShape of, auto change, const char* part) {
    Int8Epilogue epilogue = data.epilogue(out.data());
    change(epilogue);
    try {
      cpu::int8_linear(of, data.input.data(), packed.data(), epilogue, cpu::best_int8_isa(), SerialExecutor());
      FAIL() << "no error with " << part;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  expect_refused({0, kInt8MaxTerms + 1, 16}, [](Int8Epilogue&) {}, "131072 terms");
  expect_refused({0, kInt8MaxTermsShifted + 1, 16}, [](Int8Epilogue& e) { e.input.zero_point = 1; }, "65794 terms");
  expect_refused(shape, [](Int8Epilogue& e) { e.input.zero_point = 128; }, "zero_point is 128");
  expect_refused(shape, [](Int8Epilogue& e) { e.input.zero_point = -129; }, "zero_point is -129");
  expect_refused(shape, [](Int8Epilogue& e) { e.input.zero_point = 1, e.row_scales = e.weight_scales; }, "row_scales");
  expect_refused(shape, [](Int8Epilogue& e) { e.out.dtype = DType::kFloat64; }, "out is float64");
  expect_refused(
      shape, [](Int8Epilogue& e) { e.residual = e.bias = e.weight_scales, e.residual_dtype = DType::kFloat64; },
      "residual is float64");
  expect_refused(
      shape, [](Int8Epilogue& e) { e.out.kind = Int8OutKind::kInt8, e.out.parameters.zero_point = 200; },
      "zero_point is 200");
  for (const Int8Isa isa : {Int8Isa::kAvx2, Int8Isa::kAvxVnni, Int8Isa::kAvx512Vnni, Int8Isa::kAmx}) {
    if (cpu::has_int8_isa(isa)) continue;
    EXPECT_THROW(
        cpu::int8_linear(shape, data.input.data(), packed.data(), data.epilogue(out.data()), isa, SerialExecutor()),
        InvalidArgument);
  }
  EXPECT_TRUE(cpu::has_int8_isa(cpu::best_int8_isa()));
  EXPECT_THROW(cpu::int8_packed_bytes({10, 4, 3}), InvalidArgument);
  EXPECT_THROW(cpu::int8_packed_bytes({10, kInt8MaxTerms + 1}), InvalidArgument);
  EXPECT_THROW(cpu::int8_packed_bytes({10, 4, 0}), InvalidArgument);
}

// Through a product of one term: out = activation(1 * (1 * 1) * 0 + x), with x as the residual.
std::vector<float> activated(Activation activation, const std::vector<float>& x) {
  const std::vector<std::int8_t> input(x.size(), 0);
  const std::int8_t weight = 1;
  const float scale = 1.0F;
  std::vector<float> out(x.size());
  test::Int8Packed packed({1, 1}, &weight);
  const Int8Epilogue epilogue{.input = {},
                              .weight_scales = &scale,
                              .residual = x.data(),
                              .activation = activation,
                              .out = {out.data(), Int8OutKind::kFloat}};
  cpu::int8_linear({static_cast<std::int64_t>(x.size()), 1, 1}, input.data(), packed.data(), epilogue,
                   cpu::best_int8_isa(), SerialExecutor());
  return out;
}

TEST(Int8Activations, AreTheFormulasToTheLastPlaces) {
  std::vector<float> x;
  for (int i = -24000; i <= 24000; ++i) x.push_back(static_cast<float>(i) / 1000.0F);
  for (int exponent = -60; exponent <= 10; ++exponent)
    for (const float sign : {1.0F, -1.0F}) x.push_back(sign * std::ldexp(1.37F, exponent));
  for (const Activation activation : test::activations()) {
    const std::vector<float> out = activated(activation, x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      // What x is multiplied by has the last place of 1: the error is one of x, not of the result.
      const double exact = test::activate_exactly(activation, static_cast<double>(x[i]));
      ASSERT_NEAR(out[i], exact, 4 * 0x1p-24 * std::fabs(static_cast<double>(x[i])))
          << "activation " << static_cast<int>(activation) << " of " << x[i];
    }
  }
}

TEST(Int8Activations, KeepNanAndInfinities) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Activation activation : test::activations()) {
    const std::vector<float> out =
        activated(activation, {std::numeric_limits<float>::quiet_NaN(), infinity, 1e30F, -1e30F});
    SCOPED_TRACE(static_cast<int>(activation));
    EXPECT_TRUE(std::isnan(out[0]));
    EXPECT_EQ(out[1], activation == Activation::kRelu6 ? 6.0F : infinity);
    EXPECT_EQ(out[2],
              activation == Activation::kRelu6 ? 6.0 : test::activate_exactly(activation, static_cast<double>(1e30F)));
    EXPECT_EQ(out[3], activation == Activation::kNone ? -1e30F : 0.0F);
  }
}

}  // namespace
}  // namespace halfstep
