// Errors of the core: one small vocabulary, and always a message.
//
//   HS_CHECK(condition, ...)   the caller's mistake     -> halfstep::InvalidArgument
//   HS_UNREACHABLE(...)        a mistake of halfstep    -> halfstep::InternalError
//   HS_CUDA_TRY(expression)    a failing CUDA call      -> halfstep::CudaError (csrc/cuda/try.h)
//
// The message is the concatenation of the macro's further arguments. It names the operation, the argument, what was
// got and what is expected; the file and line follow for HS_UNREACHABLE and HS_CUDA_TRY, where the reader is us.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace halfstep {

class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace detail {

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace detail
}  // namespace halfstep

#define HS_CHECK(condition, ...)                                                       \
  do {                                                                                 \
    if (!(condition)) [[unlikely]]                                                     \
      throw ::halfstep::InvalidArgument(::halfstep::detail::concatenate(__VA_ARGS__)); \
  } while (false)

#define HS_UNREACHABLE(...)        \
  throw ::halfstep::InternalError( \
      ::halfstep::detail::concatenate("halfstep internal error: ", __VA_ARGS__, " (", __FILE__, ":", __LINE__, ")"))
