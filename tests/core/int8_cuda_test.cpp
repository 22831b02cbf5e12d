// int8 products of rows, and quantization, on the GPU: bit for bit what the scalar reference says.
#include "int8_cuda_fixture.h"
#include "int8_tiles.h"

namespace halfstep {
namespace {

using test::DeviceArray;
using test::Int8Setting;
using test::PlacedBytes;

class Int8Cuda : public test::Int8CudaTest {};

TEST_F(Int8Cuda, SumsOfEveryNumberOfRows) {
  for (std::int64_t rows = 1; rows <= 70; ++rows)
    check_linear({rows, 208, 130}, {.zero_point = rows % 2 == 0 ? 0 : static_cast<std::int32_t>(rows * 3 - 128)});
}

TEST_F(Int8Cuda, SumsAroundTheEdgesOfChunksSlicesAndTiles) {
  const std::int64_t sizes[] = {1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 144, 192, 200};
  for (const std::int64_t terms : sizes)
    for (const std::int64_t channels : sizes)
      for (const std::int64_t rows : {std::int64_t{5}, std::int64_t{20}, std::int64_t{65}})
        if ((terms * 7 + channels * 3 + rows) % 4 == 0 || channels == 65)
          check_linear({rows, terms, channels}, {.zero_point = static_cast<std::int32_t>(channels % 3) - 1});
}

// More tiles than processors, so that the larger ones are chosen.
TEST_F(Int8Cuda, SumsOfLargeTiles) {
  for (const std::int64_t rows : {1279, 1280, 1281})
    for (const std::int64_t channels : {1280, 1284, 1287}) check_linear({rows, 208, channels}, {.zero_point = -5});
  for (const std::int64_t rows : {12800, 12801, 12927})
    for (const std::int64_t channels : {33, 61, 64}) check_linear({rows, 80, channels}, {.zero_point = 100});
}

TEST_F(Int8Cuda, LongSumsOfSaturatedValues) {
  for (const std::int64_t rows : {1, 17, 33, 70}) {
    for (const std::int64_t terms : {4096, 32768, 65792, 65793})
      for (const std::int32_t zero_point : {127, -128, 0})
        check_linear({rows, terms, 20}, {.zero_point = zero_point, .saturated = true});
    check_linear({rows, kInt8MaxTerms, 3}, {.saturated = true});
    check_linear({rows, kInt8MaxTerms - 15, 66}, {.saturated = true});
  }
}

TEST_F(Int8Cuda, EveryEpilogue) {
  for (const Int8Setting& setting : test::int8_settings()) {
    for (const std::int64_t rows : {3, 70})
      for (const std::int64_t channels : {72, 75}) check_linear({rows, 96, channels}, setting);
    if (testing::Test::HasFailure()) return;
  }
}

TEST_F(Int8Cuda, EveryEpilogueOfTheLargeTile) {
  for (const Int8Setting& setting : test::int8_settings())
    if (setting.residual == DType::kFloat16) check_linear({1300, 16, 1288}, setting);
}

// Hopper's tiles one by one, whichever the table takes.
class Int8Tiles : public test::Int8CudaTest, public testing::WithParamInterface<int> {
 protected:
  void SetUp() override {
    Int8CudaTest::SetUp();
    if (IsSkipped()) return;
    cudaDeviceProp properties{};
    ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    if (properties.major != 9) GTEST_SKIP() << "needs compute capability 9.0";
  }
  void check_tile(const Int8LinearShape& shape, const Int8Setting& setting = {}) {
    test::Int8Product product = test::linear_product(shape);
    product.call = [&](auto... arguments) {
      ASSERT_TRUE(cuda::int8_linear_by_tile(static_cast<cuda::Int8Tile>(GetParam()), shape, arguments...));
    };
    check(product, setting);
  }
};

TEST_P(Int8Tiles, SumsAroundTheEdgesOfSlicesAndTiles) {
  for (const std::int64_t terms : {16, 112, 128, 144, 656, 1040})
    for (const std::int64_t channels : {32, 64, 96, 288})
      for (const std::int64_t rows : {1, 7, 63, 65, 129, 300})
        if ((terms / 16 + channels / 32 + rows) % 3 == 0)
          check_tile({rows, terms, channels}, {.zero_point = static_cast<std::int32_t>(rows % 3) - 1});
}

// Each block walks over several tiles, more of them than it has stages, in panels of which the last one is not full.
TEST_P(Int8Tiles, SumsOfManyTiles) {
  check_tile({4500, 96, 2080});
  check_tile({70, 144, 33 * 1024}, {.zero_point = -3});
  check_tile({33 * 1024 + 5, 272, 64}, {.zero_point = 5});
}

TEST_P(Int8Tiles, LongSumsOfSaturatedValues) {
  for (const std::int32_t zero_point : {127, -128, 0})
    check_tile({70, 65792, 64}, {.zero_point = zero_point, .saturated = true});
  check_tile({70, kInt8MaxTerms / 16 * 16, 64}, {.saturated = true});
}

TEST_P(Int8Tiles, EveryEpilogue) {
  for (Int8Setting setting : test::int8_settings()) {
    setting.out_offset = 0;  // one that is not aligned is for other kernels
    check_tile({333, 144, 352}, setting);
    if (testing::Test::HasFailure()) return;
  }
}

TEST_P(Int8Tiles, RefusesWhatItsCopiesCannotRead) {
  const auto tile = static_cast<cuda::Int8Tile>(GetParam());
  const DeviceArray<std::int8_t> bytes(std::vector<std::int8_t>(64 * 1024, 1), stream_);
  const DeviceArray<float> scales(std::vector<float>(1024, 1.0F), stream_);
  const Int8Epilogue epilogue{.weight_scales = scales.get(), .out = {bytes.get() + 32768, Int8OutKind::kInt8}};
  const auto runs = [&](Int8LinearShape shape, std::size_t offset) {
    return cuda::int8_linear_by_tile(tile, shape, bytes.get() + offset, bytes.get() + 16384, nullptr, epilogue,
                                     {stream_});
  };
  EXPECT_TRUE(runs({64, 64, 64}, 0));
  EXPECT_FALSE(runs({64, 64, 64}, 8));
  EXPECT_FALSE(runs({64, 72, 64}, 0));
  EXPECT_FALSE(runs({64, 64, 48}, 0));
  EXPECT_FALSE(runs({0, 64, 64}, 0));
  EXPECT_FALSE(runs({64, 0, 64}, 0));
}

INSTANTIATE_TEST_SUITE_P(All, Int8Tiles, testing::Range(0, cuda::kInt8Tiles));

// Its share of the processors decides: one large tile each is better than many small ones, and the other way round.
TEST(Int8TileChoice, FollowsTheSize) {
  using cuda::Int8Tile;
  EXPECT_EQ(cuda::int8_tile_for({8192, 8192, 8192}, 132), Int8Tile::kPair256x256);
  EXPECT_EQ(cuda::int8_tile_for({64, 4096, 4096}, 132), Int8Tile::k64x64);
  EXPECT_EQ(cuda::int8_tile_for({8192, 768, 768}, 132), Int8Tile::k128x128);
}

TEST_F(Int8Cuda, AnyAlignment) {
  for (const std::int64_t terms : {std::int64_t{64}, std::int64_t{100}, std::int64_t{101}})
    for (const std::int64_t rows : {7, 30, 100})
      for (const std::size_t offset : {1, 2, 3, 4, 8, 12})
        for (int which = 0; which < 4; ++which) {
          Int8Setting setting{.zero_point = 9};
          if (which == 0 || which == 3) setting.input_offset = offset;
          if (which == 1 || which == 3) setting.weight_offset = offset;
          if (which == 2 || which == 3) setting.out_offset = offset;
          check_linear({rows, terms, 72}, setting);
        }
}

TEST_F(Int8Cuda, NothingToDo) {
  check_linear({0, 64, 64});
  check_linear({64, 64, 0});
  for (const std::int64_t rows : {2, 80}) {  // no terms: bias alone
    check_linear({rows, 0, 40});
    check_linear({rows, 0, 40}, {.zero_point = 3, .bias = true, .kind = Int8OutKind::kFloat});
  }
}

TEST_F(Int8Cuda, RefusesSumsThatMayNotFit) {
  const Int8Epilogue epilogue{.input = {}, .weight_scales = nullptr, .out = {nullptr, Int8OutKind::kSums}};
  Int8Epilogue shifted = epilogue;
  shifted.input.zero_point = 1;
  std::int32_t sums = 0;  // not read
  EXPECT_THROW(cuda::int8_linear({1, kInt8MaxTerms + 1, 1}, nullptr, nullptr, nullptr, epilogue, {stream_}),
               InvalidArgument);
  EXPECT_THROW(cuda::int8_linear({1, kInt8MaxTermsShifted + 1, 1}, nullptr, nullptr, &sums, shifted, {stream_}),
               InvalidArgument);
  EXPECT_THROW(cuda::int8_linear({1, 64, 1}, nullptr, nullptr, nullptr, shifted, {stream_}), InvalidArgument);
  shifted.row_scales = reinterpret_cast<const float*>(&sums);
  EXPECT_THROW(cuda::int8_linear({1, 64, 1}, nullptr, nullptr, &sums, shifted, {stream_}), InvalidArgument);
}

// A row that is not finite, and a residual that is not: NaN and infinity reach the output as the rules say.
TEST_F(Int8Cuda, NonFiniteScalesAndResiduals) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const std::size_t rows : {std::size_t{4}, std::size_t{40}}) {
    std::vector<float> scales(rows, 1.0F);
    scales[1] = kNan;
    std::vector<float> residual(rows * 8, 0.0F);
    residual[2 * 8 + 3] = kInfinity;
    residual[3 * 8 + 5] = -kInfinity;
    const DeviceArray<std::int8_t> input(std::vector<std::int8_t>(rows * 16, 1), stream_);
    const DeviceArray<std::int8_t> weight(std::vector<std::int8_t>(8 * 16, 2), stream_);
    const DeviceArray<float> weight_scales(std::vector<float>(8, 1.0F), stream_);
    const DeviceArray<float> row_scales(scales, stream_);
    const DeviceArray<float> residuals(residual, stream_);
    const DeviceArray<float> out(rows * 8);
    const DeviceArray<std::int8_t> quantized(rows * 8);
    Int8Epilogue epilogue{.input = {},
                          .row_scales = row_scales.get(),
                          .weight_scales = weight_scales.get(),
                          .residual = residuals.get(),
                          .activation = Activation::kRelu,
                          .out = {out.get(), Int8OutKind::kFloat}};
    const Int8LinearShape shape{static_cast<std::int64_t>(rows), 16, 8};
    cuda::int8_linear(shape, input.get(), weight.get(), nullptr, epilogue, {stream_});
    epilogue.out = {quantized.get(), Int8OutKind::kInt8, DType::kFloat32, {1.0F, -7}};
    cuda::int8_linear(shape, input.get(), weight.get(), nullptr, epilogue, {stream_});
    const std::vector<float> floats = out.read(stream_);
    const std::vector<std::int8_t> ints = quantized.read(stream_);
    for (std::size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(floats[i], 32.0F);
      EXPECT_EQ(ints[i], 25);
      EXPECT_TRUE(std::isnan(floats[8 + i]));
      EXPECT_EQ(ints[8 + i], -7);
    }
    EXPECT_EQ(floats[2 * 8 + 3], kInfinity);
    EXPECT_EQ(ints[2 * 8 + 3], 127);
    EXPECT_EQ(floats[3 * 8 + 5], 0.0F);
    EXPECT_EQ(ints[3 * 8 + 5], -7);
  }
}

// More than 2^31 outputs: every index of them is 64 bits wide. Needs 2.2 GB.
TEST_F(Int8Cuda, MoreThanTwoToTheThirtyOneOutputs) {
  const Int8LinearShape shape{(std::int64_t{1} << 20) + 1, 16, 2048};
  const auto outputs = static_cast<std::size_t>(shape.rows * shape.channels);
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  HS_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < (std::size_t{3} << 30)) {
    if (required()) FAIL() << "HALFSTEP_REQUIRE_CUDA=1, but less than 3 GiB of GPU memory are free";
    GTEST_SKIP() << "needs 3 GiB of free GPU memory";
  }
  const auto input = test::int8_values(static_cast<std::size_t>(shape.rows * shape.terms), 1);
  const auto weight = test::int8_values(static_cast<std::size_t>(shape.channels * shape.terms), 2);
  const DeviceArray<std::int8_t> placed_input(input, stream_);
  const DeviceArray<std::int8_t> placed_weight(weight, stream_);
  const DeviceArray<float> weight_scales(std::vector<float>(2048, 0.002F), stream_);
  const DeviceArray<std::int8_t> out(outputs);
  const Int8Epilogue epilogue{
      .input = {}, .weight_scales = weight_scales.get(), .out = {out.get(), Int8OutKind::kInt8}};
  cuda::int8_linear(shape, placed_input.get(), placed_weight.get(), nullptr, epilogue, {stream_});
  std::vector<std::int8_t> last(2048);
  HS_CUDA_TRY(cudaMemcpyAsync(last.data(), out.get() + outputs - 2048, 2048, cudaMemcpyDeviceToHost, stream_));
  HS_CUDA_TRY(cudaStreamSynchronize(stream_));
  std::vector<std::int32_t> sums(2048);
  reference::int8_linear({1, 16, 2048}, input.data() + (shape.rows - 1) * 16, 0, weight.data(), sums.data());
  for (std::size_t i = 0; i < last.size(); ++i)
    ASSERT_EQ(last[i], quantize_value(static_cast<float>(sums[i]) * 0.002F, 1.0F, 0)) << "channel " << i;
}

// Values that are halfway between two integers, not finite, and large, among ordinary ones.
std::vector<float> awkward_values(std::size_t count) {
  std::vector<float> values = test::float_values(count, 7, -20.0F, 20.0F);
  const float special[] = {0.5F,
                           1.5F,
                           -0.5F,
                           -2.5F,
                           1e30F,
                           -1e30F,
                           std::numeric_limits<float>::infinity(),
                           -0.0F,
                           1e-40F,
                           127.5F,
                           -128.5F,
                           std::numeric_limits<float>::quiet_NaN()};
  for (std::size_t i = 0; i < std::size(special) && i * 5 < count; ++i) values[i * 5] = special[i];
  return values;
}

TEST_F(Int8Cuda, QuantizesAndDequantizesAsTheHost) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::size_t count : {0, 1, 15, 16, 17, 1000, 100003}) {
      for (const Int8Parameters parameters : {Int8Parameters{1.0F, 0}, {0.1F, 5}, {0.3F, -128}, {1e-3F, 127}}) {
        for (const std::size_t offset : {0, 1}) {
          SCOPED_TRACE(testing::Message() << name_of(dtype) << ", " << count << " elements, scale " << parameters.scale
                                          << ", zero point " << parameters.zero_point << ", offset " << offset);
          const std::vector<char> values = test::stored_as(dtype, awkward_values(count));
          const PlacedBytes input(values.data(), values.size(), offset * size_of(dtype), stream_);
          const PlacedBytes out(nullptr, count, offset, stream_);
          const PlacedBytes back(nullptr, values.size(), offset * size_of(dtype), stream_);
          const auto numel = static_cast<std::int64_t>(count);
          cuda::quantize({input.get<void>(), numel, dtype}, {}, parameters, out.get<std::int8_t>(), {stream_});
          cuda::dequantize(out.get<std::int8_t>(), parameters, {back.get<void>(), numel, dtype}, {stream_});
          const std::vector<char> got = out.read(stream_);
          const std::vector<char> floats = back.read(stream_);
          for (std::size_t i = 0; i < count; ++i) {
            const float x = test::load_as(dtype, values.data() + i * size_of(dtype));
            const std::int8_t q = quantize_value(x, 1.0F / parameters.scale, parameters.zero_point);
            ASSERT_EQ(static_cast<std::int8_t>(got[i]), q) << "element " << i << ", " << x;
            char expected[sizeof(float)];
            test::store_as(dtype, static_cast<float>(q - parameters.zero_point) * parameters.scale, expected);
            ASSERT_EQ(std::memcmp(floats.data() + i * size_of(dtype), expected, size_of(dtype)), 0) << "element " << i;
          }
        }
      }
    }
  }
}

TEST_F(Int8Cuda, QuantizesRowsByTheirLargestMagnitude) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::size_t cols : {0, 1, 16, 31, 33, 768, 1025, 2048, 2064, 4097, 16384, 16400, 40000}) {
      for (const std::size_t offset : {0, 1}) {
        constexpr std::size_t kRows = 9;
        SCOPED_TRACE(testing::Message() << name_of(dtype) << ", " << cols << " columns, offset " << offset);
        std::vector<float> x = test::float_values(kRows * cols, 8, -3.0F, 3.0F);
        for (std::size_t i = 0; i < cols; ++i) x[3 * cols + i] = 0.0F;     // no magnitude
        for (std::size_t i = 0; i < cols; ++i) x[4 * cols + i] *= 1e-30F;  // tiny: 0 in float16
        for (std::size_t i = 0; i < cols; ++i) x[5 * cols + i] *= 1e-42F;  // subnormal
        if (cols > 0) x[6 * cols + cols / 2] = std::numeric_limits<float>::quiet_NaN();
        if (cols > 0) x[7 * cols + cols - 1] = -std::numeric_limits<float>::infinity();
        if (cols > 0) x[8 * cols + cols - 1] = -5.0F;
        const std::vector<char> values = test::stored_as(dtype, x);
        const PlacedBytes input(values.data(), values.size(), offset * size_of(dtype), stream_);
        const PlacedBytes out(nullptr, kRows * cols, offset, stream_);
        const PlacedBytes placed_scales(nullptr, kRows * sizeof(float), 0, stream_);
        cuda::quantize_rows({input.get<void>(), static_cast<std::int64_t>(kRows * cols), dtype}, {}, kRows,
                            out.get<std::int8_t>(), placed_scales.get<float>(), {stream_});
        const std::vector<char> got = out.read(stream_);
        const std::vector<char> scales = placed_scales.read(stream_);
        for (std::size_t row = 0; row < kRows; ++row) {
          const auto value = [&](std::size_t col) {
            return test::load_as(dtype, values.data() + (row * cols + col) * size_of(dtype));
          };
          std::uint32_t magnitude = 0;
          for (std::size_t col = 0; col < cols; ++col)
            magnitude = std::max(magnitude, std::bit_cast<std::uint32_t>(value(col)) & 0x7fffffffU);
          const float expected = row_scale(magnitude);
          float scale = 0.0F;
          std::memcpy(&scale, scales.data() + row * sizeof(float), sizeof(float));
          if (std::isnan(expected)) {
            ASSERT_TRUE(std::isnan(scale)) << "row " << row;
          } else {
            ASSERT_EQ(scale, expected) << "row " << row;
          }
          for (std::size_t col = 0; col < cols; ++col)
            ASSERT_EQ(static_cast<std::int8_t>(got[row * cols + col]), quantize_value(value(col), 1.0F / expected, 0))
                << "row " << row << ", column " << col << ", " << value(col);
        }
      }
    }
  }
}

TEST_F(Int8Cuda, WeightSums) {
  for (const std::size_t terms : {0, 1, 15, 16, 17, 511, 512, 528, 5000}) {
    for (const std::size_t offset : {0, 1}) {
      constexpr std::size_t kChannels = 11;
      const auto weight = test::int8_values(kChannels * terms, 9);
      const PlacedBytes placed(weight.data(), weight.size(), offset, stream_);
      const DeviceArray<std::int32_t> sums(std::vector<std::int32_t>(kChannels, -1), stream_);
      cuda::int8_weight_sums({kChannels, static_cast<std::int64_t>(terms)}, placed.get<std::int8_t>(), sums.get(),
                             {stream_});
      const std::vector<std::int32_t> got = sums.read(stream_);
      for (std::size_t channel = 0; channel < kChannels; ++channel) {
        std::int32_t expected = 0;
        for (std::size_t i = 0; i < terms; ++i) expected += weight[channel * terms + i];
        ASSERT_EQ(got[channel], expected) << "channel " << channel << ", " << terms << " terms, offset " << offset;
      }
    }
  }
}

TEST_F(Int8Cuda, Embedding) {
  constexpr std::size_t kEntries = 50;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::size_t width : {0, 1, 16, 48, 50, 384}) {
      for (const std::size_t count : {0, 1, 100}) {
        for (const bool wide : {false, true}) {
          for (const std::size_t offset : {0, 1}) {
            const auto weight = test::int8_values(kEntries * width, 10);
            const auto scales = test::float_values(kEntries, 11, 0.01F, 0.1F);
            std::vector<std::int64_t> indices(count);
            for (std::size_t i = 0; i < count; ++i) indices[i] = static_cast<std::int64_t>(i * 17 % kEntries);
            const std::vector<std::int32_t> narrow_indices(indices.begin(), indices.end());
            const PlacedBytes placed_weight(weight.data(), weight.size(), offset, stream_);
            const DeviceArray<float> placed_scales(scales, stream_);
            const DeviceArray<std::int64_t> wide_placed(indices, stream_);
            const DeviceArray<std::int32_t> narrow_placed(narrow_indices, stream_);
            const PlacedBytes out(nullptr, count * width * size_of(dtype), offset * size_of(dtype), stream_);
            cuda::int8_embedding({placed_weight.get<std::int8_t>(),
                                  placed_scales.get(),
                                  kEntries,
                                  static_cast<std::int64_t>(width),
                                  wide ? static_cast<const void*>(wide_placed.get()) : narrow_placed.get(),
                                  wide,
                                  static_cast<std::int64_t>(count),
                                  {out.get<void>(), static_cast<std::int64_t>(count * width), dtype}},
                                 {stream_});
            const std::vector<char> got = out.read(stream_);
            for (std::size_t i = 0; i < count * width; ++i) {
              const auto index = static_cast<std::size_t>(indices[i / width]);
              char expected[sizeof(float)];
              test::store_as(dtype, static_cast<float>(weight[index * width + i % width]) * scales[index], expected);
              ASSERT_EQ(std::memcmp(got.data() + i * size_of(dtype), expected, size_of(dtype)), 0)
                  << name_of(dtype) << ", width " << width << ", element " << i << ", wide indices " << wide
                  << ", offset " << offset;
            }
          }
        }
      }
    }
  }
}

TEST_F(Int8Cuda, CanBeCapturedInAGraph) {
  constexpr std::size_t kRows = 40;
  const DeviceArray<float> x(std::vector<float>(kRows * 64, 2.0F), stream_);
  const DeviceArray<std::int8_t> q(kRows * 64);
  const DeviceArray<float> scales(kRows);
  const DeviceArray<std::int8_t> weight(std::vector<std::int8_t>(64 * 9 * 32, 1), stream_);
  const DeviceArray<float> weight_scales(std::vector<float>(32, 0.5F), stream_);
  const DeviceArray<float> out(std::vector<float>(kRows * 32, -1.0F), stream_);
  const Int8Epilogue epilogue{.input = {},
                              .row_scales = scales.get(),
                              .weight_scales = weight_scales.get(),
                              .out = {out.get(), Int8OutKind::kFloat}};
  const DeviceArray<std::int32_t> conv_out(std::vector<std::int32_t>(kRows * 32, -1), stream_);
  const Int8Epilogue conv_epilogue{.input = {}, .weight_scales = nullptr, .out = {conv_out.get(), Int8OutKind::kSums}};
  const Int8ConvShape conv{.batch = 1,
                           .height = 5,
                           .width = 8,
                           .channels = 64,
                           .out_height = 5,
                           .out_width = 8,
                           .out_channels = 32,
                           .kernel_height = 3,
                           .kernel_width = 3,
                           .pad_height = 1,
                           .pad_width = 1};
  HS_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  cuda::quantize_rows({x.get(), kRows * 64, DType::kFloat32}, {}, kRows, q.get(), scales.get(), {stream_});
  cuda::int8_linear({kRows, 64, 32}, q.get(), weight.get(), nullptr, epilogue, {stream_});
  cuda::int8_conv2d(conv, q.get(), weight.get(), nullptr, conv_epilogue, {stream_});
  cudaGraph_t graph = nullptr;
  HS_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  HS_CUDA_TRY(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_EQ(out.read(stream_)[0], -1.0F) << "capturing must not run";
  HS_CUDA_TRY(cudaGraphLaunch(executable, stream_));
  // 2 is 127 times the scale of its row.
  const float expected = static_cast<float>(64 * 127) * (2.0F / 127.0F * 0.5F);
  for (const float value : out.read(stream_)) ASSERT_EQ(value, expected);
  EXPECT_EQ(conv_out.read(stream_)[0], 127 * 64 * 4) << "a corner sees four taps";
  EXPECT_EQ(conv_out.read(stream_)[32 * 9], 127 * 64 * 9);
  HS_CUDA_TRY(cudaGraphExecDestroy(executable));
  HS_CUDA_TRY(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace halfstep
