// Maximum pooling of int8 images on the CPU, against plain loops.
#include "int8_pool_fixture.h"

#include <gtest/gtest.h>

#include "halfstep/status.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

class Int8Pool : public testing::TestWithParam<Int8PoolShape> {};

TEST_P(Int8Pool, TakesTheLargest) {
  const Int8PoolShape& shape = GetParam();
  std::vector<std::int8_t> input = test::pool_input(shape);
  const std::vector<std::int8_t> expected = test::pooled(shape, input);
  for (const std::size_t misaligned : {0, 1}) {  // neither input nor output start at a boundary
    std::vector<std::int8_t> out(expected.size() + 2, 99);
    input.insert(input.begin(), misaligned, 0);
    cpu::int8_max_pool2d(shape, input.data() + misaligned, out.data() + 1, test::ThreadedExecutor());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.begin() + 1));
    EXPECT_EQ(out.front(), 99);
    EXPECT_EQ(out.back(), 99);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Int8Pool, testing::ValuesIn(test::pool_shapes()));

TEST(Int8PoolErrors, NameWhatIsWrong) {
  std::int8_t byte = 0;
  for (const Int8PoolShape& shape : test::bad_pool_shapes())
    EXPECT_THROW(cpu::int8_max_pool2d(shape, &byte, &byte, SerialExecutor()), InvalidArgument);
}

}  // namespace
}  // namespace halfstep
