// Tensors to observe, for the CPU and the CUDA tests.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gradient_fixture.h"
#include "halfstep/calibration.h"

namespace halfstep::test {

struct ObservedCase {
  std::string name;
  DType dtype;
  std::vector<double> values;
  std::size_t misaligned = 0;
};

inline std::ostream& operator<<(std::ostream& out, const ObservedCase& c) {
  return out << c.name << ", " << name_of(c.dtype) << ", misaligned " << c.misaligned;
}

// Sizes around the boundaries of lanes, vectors, blocks and tasks; every kind of value.
inline std::vector<ObservedCase> observed_cases() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double nan = std::nan("");
  std::vector<ObservedCase> cases;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::size_t size : {0, 1, 3, 31, 32, 33, 100, 4095, 4097, 70000, 300001})
      cases.push_back({"normal of " + std::to_string(size), dtype, normal_values(size, 3.0, 1), size % 2 * 3});
    std::vector<double> relu = normal_values(150000, 1.0, 2);
    for (double& x : relu) x = std::max(x, 0.0);
    cases.push_back({"relu", dtype, relu});
    std::vector<double> heavy = normal_values(70000, 1.0, 3);
    for (double& x : heavy) x = x * x * x * x * x;
    cases.push_back({"heavy tails", dtype, heavy});
    std::vector<double> mixed = heavy;
    for (std::size_t i = 0; i < mixed.size(); i += 7)
      mixed[i] = i % 2 != 0 ? kInfinity : (i % 3 != 0 ? nan : -kInfinity);
    cases.push_back({"with infinities and NaN", dtype, mixed, 1});
    cases.push_back({"nothing finite", dtype, {nan, kInfinity, -kInfinity}});
    cases.push_back({"zeros", dtype, std::vector<double>(5000, 0.0)});
    cases.push_back({"zeros of both signs", dtype, {0.0, -0.0, -0.0}});
    cases.push_back({"one value", dtype, std::vector<double>(5000, -2.5)});
    cases.push_back({"powers of two", dtype, {1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 4.0, -4.0}});
    const double tiny = dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-133;  // subnormal
    cases.push_back({"subnormals", dtype, {tiny, -tiny, 3 * tiny, 0.0, -7 * tiny}});
    const double largest = dtype == DType::kFloat16 ? 65504.0 : 0x1.fep127;
    cases.push_back({"all magnitudes", dtype, {tiny, largest, -tiny, -largest, 1.0, -1.0, 0.0}});
  }
  return cases;
}

struct ChannelCase {
  ChannelShape shape;
  DType dtype;
};

inline std::vector<ChannelCase> channel_cases() {
  std::vector<ChannelCase> cases;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const ChannelShape& shape :
         {ChannelShape{1, 1, 1}, ChannelShape{7, 3, 1}, ChannelShape{1000, 33, 1}, ChannelShape{3, 5000, 1},
          ChannelShape{30000, 4, 1}, ChannelShape{2, 3, 49}, ChannelShape{1, 3, 50001}, ChannelShape{40, 17, 300},
          ChannelShape{9, 2, 5}, ChannelShape{300, 1, 257}, ChannelShape{0, 4, 3}, ChannelShape{4, 0, 3}})
      cases.push_back({shape, dtype});
  return cases;
}

// Every eleventh element is not finite.
inline std::vector<double> channel_values(const ChannelShape& shape) {
  std::vector<double> values = normal_values(static_cast<std::size_t>(shape.numel()), 5.0, 4);
  for (std::size_t i = 10; i < values.size(); i += 11) values[i] = i % 2 != 0 ? std::nan("") : -HUGE_VAL;
  return values;
}

}  // namespace halfstep::test
