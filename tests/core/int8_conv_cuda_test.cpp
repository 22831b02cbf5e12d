// int8 convolutions on the GPU: bit for bit what the scalar reference says.
#include "int8_cuda_fixture.h"
#include "int8_tiles.h"

namespace halfstep {
namespace {

using test::Int8Setting;

class Int8ConvCuda : public test::Int8CudaTest {};

struct Sizes {
  std::int64_t batch, height, width, channels, out_channels;
  std::int64_t kernel_height, kernel_width;
  std::int64_t stride = 1;
  std::int64_t pad = 0;
  std::int64_t dilation = 1;
  std::int64_t groups = 1;
};

// The output sizes that torch computes; the width has one more of padding and of stride than the height.
Int8ConvShape shape_of(const Sizes& s, bool uneven = false) {
  const std::int64_t more = uneven ? 1 : 0;
  Int8ConvShape shape{.batch = s.batch,
                      .height = s.height,
                      .width = s.width,
                      .channels = s.channels,
                      .out_height = 0,
                      .out_width = 0,
                      .out_channels = s.out_channels,
                      .kernel_height = s.kernel_height,
                      .kernel_width = s.kernel_width,
                      .stride_height = s.stride,
                      .stride_width = s.stride + more,
                      .pad_height = s.pad,
                      .pad_width = s.pad + more,
                      .dilation_height = s.dilation,
                      .dilation_width = s.dilation + more,
                      .groups = s.groups};
  const auto out = [](std::int64_t in, std::int64_t pad, std::int64_t dilation, std::int64_t kernel,
                      std::int64_t stride) { return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; };
  shape.out_height = out(s.height, shape.pad_height, shape.dilation_height, s.kernel_height, shape.stride_height);
  shape.out_width = out(s.width, shape.pad_width, shape.dilation_width, s.kernel_width, shape.stride_width);
  return shape;
}

TEST_F(Int8ConvCuda, KernelsStridesPaddingAndDilation) {
  for (const std::int64_t channels : {3, 4, 16, 20, 64})
    for (const std::int64_t kernel : {1, 2, 3, 5})
      for (const std::int64_t stride : {1, 2})
        for (const std::int64_t pad : {0, 1, 2})
          for (const std::int64_t dilation : {1, 2})
            for (const bool uneven : {false, true})
              if ((channels + kernel + stride * 3 + pad * 5 + dilation * 7) % 3 != 0 || kernel == 3)
                check_conv(shape_of({2, 10, 13, channels, 24, kernel, kernel, stride, pad, dilation}, uneven),
                           {.zero_point = uneven ? -11 : 0});
}

TEST_F(Int8ConvCuda, KernelsThatAreNotSquare) {
  for (const std::int64_t channels : {5, 8, 32}) {
    check_conv(shape_of({1, 9, 12, channels, 17, 1, 7, 1, 3}), {.zero_point = 4});
    check_conv(shape_of({1, 9, 12, channels, 17, 7, 1, 2, 3}), {.zero_point = -4});
    check_conv(shape_of({3, 9, 12, channels, 70, 2, 4}), {.zero_point = 1});
  }
}

// The terms of a slice, 64, lie in four taps, one, or a part of one.
TEST_F(Int8ConvCuda, ChannelsAroundTheEdgesOfChunksAndSlices) {
  for (const std::int64_t channels : {1, 2, 7, 12, 16, 31, 32, 48, 63, 64, 65, 80, 128, 144})
    for (const std::int64_t out_channels : {1, 16, 63, 64, 65, 130})
      check_conv(shape_of({1, 6, 7, channels, out_channels, 3, 3, 1, 1}), {.zero_point = 100});
}

TEST_F(Int8ConvCuda, LargeTiles) {
  check_conv(shape_of({2, 57, 57, 16, 256, 3, 3, 1, 1}), {.zero_point = -3});
  check_conv(shape_of({2, 57, 57, 32, 260, 3, 3, 1, 1}), {.zero_point = 0});
  check_conv(shape_of({4, 57, 57, 16, 64, 3, 3, 1, 1}), {.zero_point = 90});
  check_conv(shape_of({4, 113, 113, 16, 40, 3, 3, 2, 1}), {.zero_point = 0});
  check_conv(shape_of({8, 57, 57, 64, 128, 3, 3, 1, 1, 1, 2}), {.zero_point = -128});
}

TEST_F(Int8ConvCuda, Stem) {
  check_conv(shape_of({2, 37, 41, 3, 64, 7, 7, 2, 3}), {.zero_point = -20});
  check_conv(shape_of({1, 32, 32, 3, 96, 4, 4, 4}), {.zero_point = 0});
}

// Windows side by side: with rows that overlap, are spread, or lie in the padding, that end with the image or before
// it.
TEST_F(Int8ConvCuda, Patches) {
  for (const std::int64_t channels : {1, 3, 16, 24})
    for (const std::int64_t width : {32, 37, 48})
      for (const std::int64_t kernel : {2, 4, 16})
        for (const std::int64_t pad : {0, 1}) {
          Int8ConvShape shape = shape_of({2, 32, width, channels, 64, kernel, kernel, kernel, pad});
          check_conv(shape, {.zero_point = -9});
          shape.stride_height = 1;
          shape.out_height = 32 + 2 * pad - kernel + 1;
          check_conv(shape, {.zero_point = 3});
          shape.out_width -= 1;
          check_conv(shape);
          shape.out_width += 3;
          check_conv(shape, {.zero_point = 77});
        }
  const auto of_height = [](std::int64_t kernel, std::int64_t pad, std::int64_t dilation) {
    Int8ConvShape shape = shape_of({3, 19, 24, 12, 32, kernel, 4, 4});
    shape.pad_height = pad;
    shape.dilation_height = dilation;
    shape.stride_height = 2;
    shape.out_height = (19 + 2 * pad - dilation * (kernel - 1) - 1) / 2 + 1;
    return shape;
  };
  for (const std::int64_t kernel : {1, 3, 6})
    for (const std::int64_t pad : {0, 2})
      for (const std::int64_t dilation : {1, 3}) check_conv(of_height(kernel, pad, dilation), {.zero_point = 21});
  check_conv(shape_of({3, 19, 24, 12, 32, 1, 4, 4}));
  Int8ConvShape product = shape_of({3, 19, 24, 12, 32, 1, 4, 4});
  product.stride_height = 1;
  product.out_height = 19;
  check_conv(product, {.zero_point = -30});
}

TEST_F(Int8ConvCuda, OneByOne) {
  for (const std::int64_t stride : {1, 2})
    for (const std::int64_t pad : {0, 1})
      for (const std::int64_t channels : {16, 30}) {
        check_conv(shape_of({2, 8, 9, channels, 33, 1, 1, stride, pad}), {.zero_point = 6});
        check_conv(shape_of({5, 1, 1, channels, 33, 1, 1, stride, pad}), {.zero_point = -6});
      }
}

TEST_F(Int8ConvCuda, Groups) {
  for (const std::int64_t group_channels : {1, 2, 3, 4, 8, 16, 20, 32})
    for (const std::int64_t group_outputs : {1, 2, 4, 15, 16, 17, 33, 72})
      for (const std::int64_t groups : {2, 5})
        check_conv(shape_of({2, 7, 6, group_channels * groups, group_outputs * groups, 3, 3, 1, 1, 1, groups}),
                   {.zero_point = static_cast<std::int32_t>(group_channels) - 4});
}

TEST_F(Int8ConvCuda, Depthwise) {
  for (const std::int64_t channels : {1, 3, 4, 30, 32, 72})
    for (const std::int64_t kernel : {3, 5})
      for (const std::int64_t stride : {1, 2})
        for (const bool uneven : {false, true})
          if (channels > 1 || kernel == 3)
            check_conv(
                shape_of({2, 11, 10, channels, channels, kernel, kernel, stride, kernel / 2, 1, channels}, uneven),
                {.zero_point = stride == 1 ? 17 : 0});
}

// Output sizes are the caller's: taps may lie beyond the image on the other sides too.
TEST_F(Int8ConvCuda, OutputSizesThatReachBeyondTheImage) {
  for (const std::int64_t channels : {6, 32})
    for (const std::int64_t groups : {std::int64_t{1}, channels}) {
      Int8ConvShape shape = shape_of({2, 5, 4, channels, channels, 3, 3, 2, 1, 1, groups});
      shape.out_height += 3;
      shape.out_width += 2;
      check_conv(shape, {.zero_point = 50});
      Int8ConvShape cropped = shape_of({2, 5, 4, channels, channels, 1, 1, 1, 0, 1, groups});
      cropped.out_height = 7;
      cropped.out_width = 2;
      check_conv(cropped, {.zero_point = 50});
    }
}

TEST_F(Int8ConvCuda, EveryEpilogue) {
  for (const Int8Setting& setting : test::int8_settings()) {
    check_conv(shape_of({3, 5, 6, 16, 72, 3, 3, 1, 1}), setting);         // tiles
    check_conv(shape_of({3, 5, 6, 16, 40, 1, 1}), setting);               // rows
    check_conv(shape_of({3, 5, 6, 12, 12, 3, 3, 1, 1, 1, 12}), setting);  // depthwise, by four
    check_conv(shape_of({3, 5, 6, 10, 10, 3, 3, 1, 1, 1, 5}), setting);   // a thread for each output
    if (testing::Test::HasFailure()) return;
  }
}

TEST_F(Int8ConvCuda, AnyAlignment) {
  for (const std::int64_t groups : {1, 2, 16, 32})
    for (const std::size_t offset : {1, 2, 4, 8})
      for (int which = 0; which < 4; ++which) {
        Int8Setting setting{.zero_point = -9};
        if (which == 0 || which == 3) setting.input_offset = offset;
        if (which == 1 || which == 3) setting.weight_offset = offset;
        if (which == 2 || which == 3) setting.out_offset = offset;
        check_conv(shape_of({1, 8, 9, 32, 32, 3, 3, 1, 1, 1, groups}), setting);
      }
}

TEST_F(Int8ConvCuda, LongSumsOfSaturatedValues) {
  for (const std::int32_t zero_point : {127, -128, 0}) {
    check_conv(shape_of({1, 3, 3, 3640, 20, 3, 3, 1, 1}), {.zero_point = zero_point, .saturated = true});
    check_conv(shape_of({1, 3, 3, 7296, 20, 3, 3, 1, 1}), {.zero_point = zero_point, .saturated = true});
  }
}

TEST_F(Int8ConvCuda, NothingToDo) {
  check_conv(shape_of({0, 5, 6, 16, 16, 3, 3, 1, 1}));
  check_conv(shape_of({1, 5, 6, 16, 0, 3, 3, 1, 1}));
  Int8ConvShape empty = shape_of({1, 5, 6, 16, 16, 3, 3, 1, 1});
  empty.out_height = 0;
  check_conv(empty);
}

// Hopper's tiles one by one.
class Int8ConvTiles : public test::Int8CudaTest, public testing::WithParamInterface<cuda::Int8Tile> {
 protected:
  void SetUp() override {
    Int8CudaTest::SetUp();
    if (!IsSkipped() && !cuda::has_int8_wgmma(0)) GTEST_SKIP() << "needs compute capability 9.0";
  }
  void check_tile(const Int8ConvShape& shape, const Int8Setting& setting = {}) {
    test::Int8Product product = test::conv_product(shape);
    product.call = [&](auto... arguments) { ASSERT_TRUE(cuda::int8_conv2d_by_tile(GetParam(), shape, arguments...)); };
    check(product, setting);
  }
};

TEST_P(Int8ConvTiles, KernelsStridesPaddingAndDilation) {
  for (const std::int64_t channels : {16, 48, 128})
    for (const std::int64_t kernel : {1, 2, 3, 5})
      for (const std::int64_t stride : {1, 2})
        for (const std::int64_t pad : {0, 1, 2})
          for (const bool uneven : {false, true})
            if ((channels / 16 + kernel + stride + pad) % 3 != 0 || kernel == 3)
              check_tile(
                  shape_of({3, 10, 13, channels, 96, kernel, kernel, stride, pad, 1 + channels / 16 % 2}, uneven),
                  {.zero_point = uneven ? -11 : 0});
}

// A slice of 128 terms lies in eight taps, in one, or in a part of one; and the last slice is not full.
TEST_P(Int8ConvTiles, ChannelsAroundTheEdgesOfSlices) {
  for (const std::int64_t channels : {16, 32, 80, 112, 128, 144, 272})
    for (const std::int64_t out_channels : {32, 160, 288})
      check_tile(shape_of({2, 9, 7, channels, out_channels, 3, 3, 1, 1}), {.zero_point = 100});
}

// Each block walks over several tiles, whose pixels lie in several images.
TEST_P(Int8ConvTiles, ManyTiles) {
  check_tile(shape_of({2, 113, 113, 16, 64, 3, 3, 1, 1}), {.zero_point = -128});
  check_tile(shape_of({600, 7, 7, 32, 64, 3, 3, 1, 1}), {.zero_point = 127});
  check_tile(shape_of({3, 57, 57, 16, 544, 3, 3, 2, 1}));
}

TEST_P(Int8ConvTiles, OutputSizesThatReachBeyondTheImage) {
  Int8ConvShape shape = shape_of({2, 5, 4, 32, 64, 3, 3, 2, 1});
  shape.out_height += 3;
  shape.out_width += 2;
  check_tile(shape, {.zero_point = 50});
}

TEST_P(Int8ConvTiles, EveryEpilogue) {
  for (Int8Setting setting : test::int8_settings()) {
    setting.out_offset = 0;  // one that is not aligned is for other kernels
    check_tile(shape_of({3, 9, 11, 48, 352, 3, 3, 1, 1}), setting);
    if (testing::Test::HasFailure()) return;
  }
}

TEST_P(Int8ConvTiles, LongSumsOfSaturatedValues) {
  for (const std::int32_t zero_point : {127, -128, 0})
    check_tile(shape_of({1, 3, 3, 7296, 32, 3, 3, 1, 1}), {.zero_point = zero_point, .saturated = true});
}

TEST(Int8ConvTileChoice, FollowsTheSize) {
  using cuda::Int8Tile;
  EXPECT_EQ(cuda::int8_conv_tile_for({12544, 2304, 256}, 132), Int8Tile::k128x256);
  EXPECT_EQ(cuda::int8_conv_tile_for({50176, 1152, 128}, 132), Int8Tile::k128x128);
  EXPECT_EQ(cuda::int8_conv_tile_for({196, 2304, 256}, 132), Int8Tile::k64x64);
  EXPECT_EQ(cuda::int8_conv_tile_for({100352, 144, 32}, 132), Int8Tile::kNone);
}

TEST_P(Int8ConvTiles, RefusesWhatItCannotGather) {
  const test::DeviceArray<std::int8_t> bytes(64 * 1024);
  const test::DeviceArray<float> scales(1024);
  const Int8Epilogue epilogue{.weight_scales = scales.get(), .out = {bytes.get() + 32768, Int8OutKind::kInt8}};
  const auto runs = [&](const Int8ConvShape& shape, std::size_t offset = 0) {
    return cuda::int8_conv2d_by_tile(GetParam(), shape, bytes.get() + offset, bytes.get() + 8192, nullptr, epilogue,
                                     {stream_});
  };
  EXPECT_TRUE(runs(shape_of({1, 8, 8, 16, 32, 3, 3, 1, 1})));
  EXPECT_FALSE(runs(shape_of({1, 8, 8, 16, 32, 3, 3, 1, 1}), 8));
  EXPECT_FALSE(runs(shape_of({1, 8, 8, 24, 32, 3, 3, 1, 1})));
  EXPECT_FALSE(runs(shape_of({1, 8, 8, 16, 48, 3, 3, 1, 1})));
  EXPECT_FALSE(runs(shape_of({1, 8, 8, 32, 32, 3, 3, 1, 1, 1, 2})));
  EXPECT_FALSE(runs(shape_of({0, 8, 8, 16, 32, 3, 3, 1, 1})));
  EXPECT_FALSE(runs(shape_of({1, 2, 40000, 16, 32, 1, 1})));
}

INSTANTIATE_TEST_SUITE_P(All, Int8ConvTiles,
                         testing::Values(cuda::Int8Tile::k128x256, cuda::Int8Tile::k128x128, cuda::Int8Tile::k64x64));

TEST_F(Int8ConvCuda, RefusesWhatItCannotCompute) {
  const Int8Epilogue epilogue{.input = {}, .weight_scales = nullptr, .out = {nullptr, Int8OutKind::kSums}};
  const auto refuses = [&](const Int8ConvShape& shape) {
    EXPECT_THROW(cuda::int8_conv2d(shape, nullptr, nullptr, nullptr, epilogue, {stream_}), InvalidArgument);
  };
  refuses(shape_of({1, 3, 3, 14564, 1, 3, 3, 1, 1}));  // 131,076 terms
  refuses(shape_of({1, 8, 8, 6, 8, 3, 3, 1, 1, 1, 4}));
  Int8ConvShape shape = shape_of({1, 8, 8, 8, 8, 3, 3, 1, 1});
  shape.stride_width = 0;
  refuses(shape);
}

}  // namespace
}  // namespace halfstep
