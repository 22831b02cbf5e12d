// The first code of the library that runs: is this the torch it was built for?
//
// torch promises no C++ ABI between minor versions, and a library built for another one dies on an undefined symbol
// without a word about the cause. The library is linked with lazy binding, and this constructor runs before the
// others; it uses nothing of torch but one C function, weakly. Python compares versions before it loads
// (halfstep/_library.py); this is for C++ programs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include <torch/headeronly/version.h>

extern "C" [[gnu::weak]] std::uint64_t aoti_torch_abi_version();

namespace {

[[gnu::constructor(101)]] void check_torch_version() {
  if (aoti_torch_abi_version == nullptr) return;
  const std::uint64_t found = aoti_torch_abi_version();
  const unsigned major = (found >> 56) & 0xffU;
  const unsigned minor = (found >> 48) & 0xffU;
  if (major == TORCH_VERSION_MAJOR && minor == TORCH_VERSION_MINOR) return;
  std::fprintf(stderr,
               "halfstep " HALFSTEP_VERSION " was built for torch " HALFSTEP_BUILT_FOR_TORCH
               ", but this process runs torch %u.%u. Build halfstep against that torch: in halfstep's folder, "
               "pip install --no-build-isolation . with the Python that has it.\n",
               major, minor);
  std::_Exit(EXIT_FAILURE);
}

}  // namespace
