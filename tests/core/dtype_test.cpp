// Every encoding of the two half types, against a definition that uses no bit tricks.
#include "halfstep/dtype.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

namespace halfstep {
namespace {

// The value of a half-precision encoding by the IEEE definition, in float64.
double value_of(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class Storage>
struct Format;
template <>
struct Format<Half> {
  static constexpr int exponent_bits = 5;
  static constexpr int mantissa_bits = 10;
};
template <>
struct Format<BFloat16> {
  static constexpr int exponent_bits = 8;
  static constexpr int mantissa_bits = 7;
};

template <class Storage>
double reference(std::uint16_t bits) {
  return value_of(bits, Format<Storage>::exponent_bits, Format<Storage>::mantissa_bits);
}

template <class Storage>
class HalfTypes : public testing::Test {};
using Storages = testing::Types<Half, BFloat16>;
struct StorageNames {
  template <class Storage>
  static std::string GetName(int) {
    return std::is_same_v<Storage, Half> ? "float16" : "bfloat16";
  }
};
TYPED_TEST_SUITE(HalfTypes, Storages, StorageNames);

TYPED_TEST(HalfTypes, WideningIsExactForEveryEncoding) {
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const auto encoding = static_cast<std::uint16_t>(bits);
    const double expected = reference<TypeParam>(encoding);
    const float got = widen(TypeParam{encoding});
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(got), expected) << bits;
      ASSERT_EQ(std::signbit(got), std::signbit(expected)) << bits;
    }
  }
}

TYPED_TEST(HalfTypes, NarrowingAWidenedValueGivesItBack) {
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const auto encoding = static_cast<std::uint16_t>(bits);
    const auto back = narrow<TypeParam>(widen(TypeParam{encoding}));
    if (std::isnan(reference<TypeParam>(encoding))) {
      ASSERT_TRUE(std::isnan(reference<TypeParam>(back.bits))) << bits;
    } else {
      ASSERT_EQ(back.bits, encoding);
    }
  }
}

// Between each two neighbours: their midpoint goes to the even one, and what lies beside it to the nearer.
TYPED_TEST(HalfTypes, NarrowingRoundsToNearestEven) {
  const auto infinity =
      static_cast<std::uint16_t>(((1 << Format<TypeParam>::exponent_bits) - 1) << Format<TypeParam>::mantissa_bits);
  for (std::uint16_t low = 0; low < infinity - 1; ++low) {
    const auto high = static_cast<std::uint16_t>(low + 1);
    const auto middle = static_cast<float>((reference<TypeParam>(low) + reference<TypeParam>(high)) / 2);
    const std::uint16_t even = low % 2 == 0 ? low : high;
    for (const float sign : {1.0F, -1.0F}) {
      const std::uint16_t sign_bit = sign < 0 ? 0x8000 : 0;
      ASSERT_EQ(narrow<TypeParam>(sign * middle).bits, sign_bit | even) << low;
      ASSERT_EQ(narrow<TypeParam>(sign * std::nextafter(middle, 0.0F)).bits, sign_bit | low) << low;
      ASSERT_EQ(narrow<TypeParam>(sign * std::nextafter(middle, HUGE_VALF)).bits, sign_bit | high) << low;
    }
  }
}

TEST(Float16, OverflowsToInfinityFromTheMidpointAboveItsLargest) {
  EXPECT_EQ(narrow<Half>(std::nextafter(65520.0F, 0.0F)).bits, 0x7bff);
  EXPECT_EQ(narrow<Half>(65520.0F).bits, 0x7c00);
  EXPECT_EQ(narrow<Half>(-1e30F).bits, 0xfc00);
  EXPECT_EQ(narrow<Half>(-HUGE_VALF).bits, 0xfc00);
}

TEST(BFloat16, OverflowsToInfinityFromTheMidpointAboveItsLargest) {
  EXPECT_EQ(narrow<BFloat16>(std::nextafter(0x1.ffp+127F, 0.0F)).bits, 0x7f7f);
  EXPECT_EQ(narrow<BFloat16>(0x1.ffp+127F).bits, 0x7f80);
  EXPECT_EQ(narrow<BFloat16>(std::numeric_limits<float>::quiet_NaN()).bits & 0x7fc0, 0x7fc0);
}

TEST(DTypeTraits, AgreeWithTheEncodings) {
  EXPECT_EQ(DTypeTraits<DType::kFloat16>::max, reference<Half>(0x7bff));
  EXPECT_EQ(DTypeTraits<DType::kFloat16>::min_normal, reference<Half>(0x0400));
  EXPECT_EQ(DTypeTraits<DType::kBFloat16>::max, reference<BFloat16>(0x7f7f));
  EXPECT_EQ(DTypeTraits<DType::kBFloat16>::min_normal, reference<BFloat16>(0x0080));
  EXPECT_EQ(DTypeTraits<DType::kFloat32>::max, std::numeric_limits<float>::max());
  EXPECT_EQ(DTypeTraits<DType::kFloat64>::max, std::numeric_limits<double>::max());
}

}  // namespace
}  // namespace halfstep
