// Maximum pooling of int8 images by four plain loops, for the CPU and the CUDA tests.
#pragma once

#include <algorithm>
#include <ostream>
#include <random>
#include <vector>

#include "halfstep/int8_pool.h"

namespace halfstep::test {

inline std::vector<std::int8_t> pool_input(const Int8PoolShape& s) {
  std::mt19937 random(static_cast<unsigned>(s.channels * 31 + s.in[0] * 7 + s.in[1]));
  std::uniform_int_distribution<int> any(-128, 127);
  std::vector<std::int8_t> values(static_cast<std::size_t>(s.batch * s.in[0] * s.in[1] * s.channels));
  for (std::int8_t& value : values) value = static_cast<std::int8_t>(any(random));
  return values;
}

inline std::vector<std::int8_t> pooled(const Int8PoolShape& s, const std::vector<std::int8_t>& input) {
  std::vector<std::int8_t> out;
  for (std::int64_t image = 0; image < s.batch; ++image)
    for (std::int64_t y = 0; y < s.out[0]; ++y)
      for (std::int64_t x = 0; x < s.out[1]; ++x)
        for (std::int64_t channel = 0; channel < s.channels; ++channel) {
          int largest = -128;
          for (std::int64_t tap = 0; tap < s.kernel[0] * s.kernel[1]; ++tap) {
            const std::int64_t row = y * s.stride[0] - s.pad[0] + tap / s.kernel[1] * s.dilation[0];
            const std::int64_t column = x * s.stride[1] - s.pad[1] + tap % s.kernel[1] * s.dilation[1];
            if (row < 0 || row >= s.in[0] || column < 0 || column >= s.in[1]) continue;
            const std::int64_t at = ((image * s.in[0] + row) * s.in[1] + column) * s.channels + channel;
            largest = std::max<int>(largest, input[static_cast<std::size_t>(at)]);
          }
          out.push_back(static_cast<std::int8_t>(largest));
        }
  return out;
}

inline std::vector<Int8PoolShape> pool_shapes() {
  std::vector<Int8PoolShape> shapes;
  for (const std::int64_t channels : {1, 3, 4, 16, 20, 31, 32, 64, 65, 130}) {
    shapes.push_back({2, channels, {11, 14}, {5, 7}, {2, 2}, {2, 2}});
    shapes.push_back({2, channels, {11, 14}, {6, 7}, {3, 3}, {2, 2}, {1, 1}});
    shapes.push_back({1, channels, {9, 5}, {9, 5}, {3, 5}, {1, 1}, {1, 2}});
    shapes.push_back({1, channels, {6, 13}, {4, 4}, {3, 2}, {2, 3}, {1, 0}, {2, 3}});  // the last windows reach outside
  }
  shapes.push_back({1, 8, {1, 1}, {3, 3}, {5, 5}, {1, 1}, {3, 3}, {2, 2}});  // some windows have no tap inside
  shapes.push_back({1, 8, {2, 40}, {1, 40}, {9, 1}, {1, 1}, {4, 0}});        // higher than the image
  shapes.push_back({3, 16, {1, 300}, {1, 150}, {1, 2}, {1, 2}});             // a signal
  shapes.push_back({1, 48, {5, 5}, {1, 1}, {5, 5}});                         // all of the image
  shapes.push_back({1, 16, {7, 7}, {7, 7}, {1, 1}});                         // nothing happens
  shapes.push_back({1, 16, {9, 9}, {3, 3}, {2, 2}, {4, 4}});                 // pixels that no window has
  shapes.push_back({0, 16, {9, 9}, {3, 3}, {2, 2}, {4, 4}});                 // no image
  shapes.push_back({2, 64, {112, 112}, {56, 56}, {3, 3}, {2, 2}, {1, 1}});   // of a ResNet
  return shapes;
}

// What the contract refuses.
inline std::vector<Int8PoolShape> bad_pool_shapes() {
  constexpr std::int64_t kHuge = (std::int64_t{1} << 28) + 1;
  const Int8PoolShape good{1, 4, {8, 8}, {4, 4}, {2, 2}, {2, 2}};
  std::vector<Int8PoolShape> shapes(7, good);
  shapes[0].channels = -1;
  shapes[1].kernel[0] = 0;
  shapes[2].stride[1] = 0;
  shapes[3].dilation[0] = 0;
  shapes[4].pad[1] = -1;
  shapes[5].in[0] = kHuge;
  shapes[6].stride[1] = kHuge / 2;  // out * stride
  return shapes;
}

}  // namespace halfstep::test

namespace halfstep {

inline void PrintTo(const Int8PoolShape& s, std::ostream* out) {
  *out << s.batch << " of " << s.in[0] << "x" << s.in[1] << "x" << s.channels << " by " << s.kernel[0] << "x"
       << s.kernel[1] << " stride " << s.stride[0] << "x" << s.stride[1] << " pad " << s.pad[0] << "x" << s.pad[1]
       << " dilation " << s.dilation[0] << "x" << s.dilation[1];
}

}  // namespace halfstep
