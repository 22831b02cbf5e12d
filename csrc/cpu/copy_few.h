// Copies of few bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace halfstep::cpu {

// Few bytes, by moves that may overlap: a call of memcpy takes longer than they do.
[[gnu::always_inline]] inline void copy_few(const std::int8_t* from, std::int64_t count, std::int8_t* to) {
  const auto by = [&]<std::size_t kBytes>(std::integral_constant<std::size_t, kBytes>) {
    constexpr auto kStep = static_cast<std::int64_t>(kBytes);
    for (std::int64_t i = 0; i + kStep <= count; i += kStep) std::memcpy(to + i, from + i, kBytes);
    if (count % kStep != 0) std::memcpy(to + count - kStep, from + count - kStep, kBytes);
  };
  constexpr std::int64_t kFew = 512;
  if (count > kFew) {
    std::memcpy(to, from, static_cast<std::size_t>(count));
  } else if (count >= 16) {
    by(std::integral_constant<std::size_t, 16>());
  } else if (count >= 8) {
    by(std::integral_constant<std::size_t, 8>());
  } else if (count >= 4) {
    by(std::integral_constant<std::size_t, 4>());
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

}  // namespace halfstep::cpu
