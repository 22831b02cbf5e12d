// Gradient lists in host memory and a float64 reference of the check, for the CPU and the CUDA tests.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <vector>

#include "halfstep/gradients.h"

namespace halfstep::test {

// A list of tensors of mixed dtypes in one byte buffer each, with a chosen misalignment in elements.
class GradientList {
 public:
  void add(DType dtype, const std::vector<double>& values, std::size_t misaligned_elements = 0) {
    const std::size_t size = size_of(dtype);
    buffers_.emplace_back((values.size() + misaligned_elements) * size + 16);
    offsets_.push_back(misaligned_elements * size);
    views_.push_back({nullptr, static_cast<std::int64_t>(values.size()), dtype});
    for (std::size_t i = 0; i < values.size(); ++i) set(views_.size() - 1, i, values[i]);
  }

  void set(std::size_t tensor, std::size_t index, double value) {
    char* const at = data(tensor) + index * size_of(views_[tensor].dtype);
    switch (views_[tensor].dtype) {
      case DType::kFloat32:
        return store(at, static_cast<float>(value));
      case DType::kFloat64:
        return store(at, value);
      case DType::kFloat16:
        return store(at, narrow<Half>(static_cast<float>(value)));
      case DType::kBFloat16:
        return store(at, narrow<BFloat16>(static_cast<float>(value)));
    }
  }

  double get(std::size_t tensor, std::size_t index) const {
    const char* const at = data(tensor) + index * size_of(views_[tensor].dtype);
    switch (views_[tensor].dtype) {
      case DType::kFloat32:
        return load<float>(at);
      case DType::kFloat64:
        return load<double>(at);
      case DType::kFloat16:
        return widen(load<Half>(at));
      case DType::kBFloat16:
        return widen(load<BFloat16>(at));
    }
    HS_UNREACHABLE("dtype");
  }

  std::size_t size() const { return views_.size(); }
  std::size_t bytes(std::size_t tensor) const { return buffers_[tensor].size(); }
  std::size_t offset(std::size_t tensor) const { return offsets_[tensor]; }
  char* buffer(std::size_t tensor) { return aligned(buffers_[tensor]); }
  const std::vector<TensorView>& shapes() const { return views_; }

  std::vector<TensorView> views() {
    std::vector<TensorView> result = views_;
    for (std::size_t i = 0; i < result.size(); ++i) result[i].data = data(i);
    return result;
  }

 private:
  using Buffer = std::vector<std::max_align_t>;
  struct Bytes {
    explicit Bytes(std::size_t count) : memory((count + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t)) {}
    std::size_t size() const { return memory.size() * sizeof(std::max_align_t); }
    Buffer memory;
  };
  static char* aligned(Bytes& bytes) { return reinterpret_cast<char*>(bytes.memory.data()); }
  static const char* aligned(const Bytes& bytes) { return reinterpret_cast<const char*>(bytes.memory.data()); }
  char* data(std::size_t tensor) { return aligned(buffers_[tensor]) + offsets_[tensor]; }
  const char* data(std::size_t tensor) const { return aligned(buffers_[tensor]) + offsets_[tensor]; }
  template <class T>
  static void store(char* at, T value) {
    std::memcpy(at, &value, sizeof value);
  }
  template <class T>
  static T load(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  std::vector<Bytes> buffers_;
  std::vector<std::size_t> offsets_;
  std::vector<TensorView> views_;
};

struct Reference {
  bool found = false;
  double norm = 0.0;
  std::vector<std::array<double, kGradientStats>> stats;
};

// The contract of halfstep/gradients.h, one element after the other, sums in float64.
inline Reference reference_check(const GradientList& list, float scale) {
  const float inverse = static_cast<float>(1.0 / static_cast<double>(scale));
  Reference result;
  double sum = 0.0;
  for (std::size_t tensor = 0; tensor < list.size(); ++tensor) {
    std::array<double, kGradientStats> row{};
    const auto count = static_cast<std::size_t>(list.shapes()[tensor].numel);
    for (std::size_t i = 0; i < count; ++i) {
      const double g = list.get(tensor, i);
      const bool wide = list.shapes()[tensor].dtype == DType::kFloat64;
      const double u = wide ? g * inverse : static_cast<double>(static_cast<float>(g) * inverse);
      const double magnitude = std::fabs(u);
      if (std::isfinite(u)) {
        row[kMaxMagnitude] = std::max(row[kMaxMagnitude], magnitude);
      } else {
        row[kNonFinite] += 1;
        result.found = true;
      }
      row[kSumOfSquares] += u * u;
      row[kZeros] += u == 0;
      row[kBelowHalf] += u != 0 && magnitude < 0x1p-14;
    }
    row[kElements] = static_cast<double>(count);
    sum += row[kSumOfSquares];
    result.stats.push_back(row);
  }
  result.norm = std::sqrt(sum);
  return result;
}

// Normal values of a given spread, reproducible.
inline std::vector<double> normal_values(std::size_t count, double spread, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, spread);
  std::vector<double> values(count);
  for (double& value : values) value = normal(random);
  return values;
}

// All dtypes, sizes around every boundary (vector, lane, chunk), empty and one-element tensors, odd alignments.
inline GradientList mixed_list(double spread) {
  GradientList list;
  unsigned seed = 1;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
    for (const std::size_t size : {0, 1, 3, 31, 32, 33, 1000, 16384, 16385, 32768, 70001}) {
      list.add(dtype, normal_values(size, spread, seed), seed % 3);
      ++seed;
    }
  }
  return list;
}

}  // namespace halfstep::test
