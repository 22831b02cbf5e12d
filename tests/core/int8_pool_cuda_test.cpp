// Maximum pooling of int8 images on the GPU, against plain loops.
#include "halfstep/status.h"
#include "int8_cuda_fixture.h"
#include "int8_pool_fixture.h"

namespace halfstep {
namespace {

class Int8PoolCuda : public test::CudaTest, public testing::WithParamInterface<Int8PoolShape> {};

TEST_P(Int8PoolCuda, TakesTheLargest) {
  const Int8PoolShape& shape = GetParam();
  const std::vector<std::int8_t> input = test::pool_input(shape);
  const std::vector<std::int8_t> expected = test::pooled(shape, input);
  for (const std::size_t misaligned : {0, 4, 1}) {
    const test::PlacedBytes from(input.data(), input.size(), misaligned, stream_);
    const test::PlacedBytes out(std::vector<std::int8_t>(expected.size(), 99).data(), expected.size(), misaligned,
                                stream_);
    cuda::int8_max_pool2d(shape, from.get<const std::int8_t>(), out.get<std::int8_t>(), {stream_});
    const std::vector<char> got = out.read(stream_);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), got.begin(), got.end(), [](std::int8_t x, char y) {
      return x == static_cast<std::int8_t>(y);
    })) << misaligned;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Int8PoolCuda, testing::ValuesIn(test::pool_shapes()));

class Int8PoolCudaErrors : public test::CudaTest {};

TEST_F(Int8PoolCudaErrors, NameWhatIsWrong) {
  const test::DeviceArray<std::int8_t> byte(1);
  for (const Int8PoolShape& shape : test::bad_pool_shapes())
    EXPECT_THROW(cuda::int8_max_pool2d(shape, byte.get(), byte.get(), {stream_}), InvalidArgument);
}

}  // namespace
}  // namespace halfstep
