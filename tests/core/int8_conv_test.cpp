// int8 convolutions of the CPU against the reference, bit for bit, with every instruction set of this processor.
#include "halfstep/status.h"
#include "int8_fixture.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::Int8Data;
using test::Int8Ending;

std::vector<std::uint8_t> run(const Int8ConvShape& shape, const Int8Data& data, Int8Isa isa,
                              const Executor& executor = SerialExecutor()) {
  test::Int8Packed packed({shape.out_channels, shape.terms(), shape.groups}, data.weight.data());
  std::vector<std::uint8_t> out = data.empty_out();
  cpu::int8_conv2d(shape, data.input.data(), packed.data(), data.epilogue(out.data()), isa, executor);
  return out;
}

void expect_matches(const Int8ConvShape& shape, const Int8Ending& ending,
                    test::Int8Fill fill = test::Int8Fill::kRandom) {
  const Int8Data data(shape, ending, fill);
  for (const Int8Isa isa : test::int8_isas()) {
    SCOPED_TRACE(testing::Message() << test::described(shape) << ", isa " << static_cast<int>(isa) << ", " << ending);
    test::expect_int8_result(data, run(shape, data, isa));
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Int8Conv, SumsAreExactForAllShapes) {
  for (const Int8ConvShape& shape : test::int8_conv_shapes()) {
    for (const std::int32_t zero_point : {0, -128, 77}) expect_matches(shape, {.zero_point = zero_point});
    if (HasFatalFailure()) return;
  }
}

// An independent sum: of a kernel of ones, over what the kernel sees, in float64.
TEST(Int8Conv, PaddingHoldsTheZeroPoint) {
  const Int8ConvShape shape = test::sized(test::int8_conv_shape(1, 4, 1, 1, 3));
  Int8Data data(shape, {.zero_point = 9});
  std::fill(data.weight.begin(), data.weight.end(), std::int8_t{1});
  for (std::int64_t y = 0; y < 4; ++y) {
    for (std::int64_t x = 0; x < 4; ++x) {
      double sum = 0.0;
      for (std::int64_t dy = std::max<std::int64_t>(y - 1, 0); dy <= std::min<std::int64_t>(y + 1, 3); ++dy)
        for (std::int64_t dx = std::max<std::int64_t>(x - 1, 0); dx <= std::min<std::int64_t>(x + 1, 3); ++dx)
          sum += data.input[static_cast<std::size_t>(dy * 4 + dx)] - 9.0;
      data.sums[static_cast<std::size_t>(y * 4 + x)] = static_cast<std::int32_t>(sum);
    }
  }
  for (const Int8Isa isa : test::int8_isas()) test::expect_int8_result(data, run(shape, data, isa));
}

TEST(Int8Conv, SumsOfTheLargestTermsFit) {
  for (const test::Int8Fill fill : {test::Int8Fill::kLargest, test::Int8Fill::kSmallest, test::Int8Fill::kMixed}) {
    expect_matches(test::sized(test::int8_conv_shape(1, 3, 7000, 3, 3)), {.zero_point = 127}, fill);
    expect_matches(test::sized(test::int8_conv_shape(1, 9, 64, 64, 9, 64)), {.zero_point = -128}, fill);
  }
}

TEST(Int8Conv, EveryEndingIsTheReferences) {
  for (const Int8Ending& ending : test::int8_endings()) {
    for (const Int8ConvShape& shape :
         {test::int8_conv_shape(3, 4, 10, 20, 3), test::int8_conv_shape(3, 4, 10, 20, 1),
          test::int8_conv_shape(3, 4, 24, 24, 3, 24), test::int8_conv_shape(3, 4, 8, 34, 3, 2),
          test::int8_conv_shape(3, 4, 8, 16, 3), test::int8_conv_shape(3, 4, 8, 16, 3, 2)}) {
      expect_matches(test::sized(shape), ending);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Int8Conv, TheSameBitsWhateverTheThreads) {
  const Int8Ending ending{.zero_point = 5, .bias = true, .kind = Int8OutKind::kInt8};
  for (const Int8ConvShape& shape :
       {test::int8_conv_shape(2, 30, 32, 40, 3), test::int8_conv_shape(2, 30, 64, 150, 1),
        test::int8_conv_shape(2, 30, 64, 96, 3, 4), test::int8_conv_shape(2, 30, 96, 96, 3, 96)}) {
    const Int8Data data(test::sized(shape), ending);
    for (const Int8Isa isa : test::int8_isas())
      EXPECT_EQ(run(test::sized(shape), data, isa), run(test::sized(shape), data, isa, test::ThreadedExecutor()));
  }
}

TEST(Int8Conv, RefusesWhatItCannotCompute) {
  const Int8ConvShape good = test::sized(test::int8_conv_shape(1, 4, 4, 4, 3));
  const Int8Data data(good, {});
  const auto expect_refused = [&](auto change) {
    Int8ConvShape shape = good;
    Int8Epilogue epilogue = data.epilogue(nullptr);
    change(shape, epilogue);
    EXPECT_THROW(cpu::int8_conv2d(shape, data.input.data(), nullptr, epilogue, cpu::best_int8_isa(), SerialExecutor()),
                 InvalidArgument);
  };
  expect_refused([](Int8ConvShape& s, Int8Epilogue&) { s.groups = 3; });
  expect_refused([](Int8ConvShape& s, Int8Epilogue&) { s.groups = 0; });
  expect_refused([](Int8ConvShape& s, Int8Epilogue&) { s.stride_width = 0; });
  expect_refused([](Int8ConvShape& s, Int8Epilogue&) { s.dilation_height = 0; });
  expect_refused([](Int8ConvShape& s, Int8Epilogue&) { s.channels = kInt8MaxTerms / 9 + 1; });
  expect_refused([](Int8ConvShape& s, Int8Epilogue& e) {
    s.channels = kInt8MaxTermsShifted / 9 + 1;
    e.input.zero_point = 1;
  });
  expect_refused([](Int8ConvShape&, Int8Epilogue& e) { e.input.zero_point = 300; });
}

}  // namespace
}  // namespace halfstep
