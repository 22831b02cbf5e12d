# halfstep_find_torch(): LibTorch by path, as targets that work without a CUDA toolkit.
#
# find_package(Torch) of a CUDA torch ends in a fatal error where no toolkit is installed, even for a program that has
# no CUDA code, and its `torch` target puts libtorch_cuda into every library that links it. So the headers and the
# libraries are taken by path, from the first of: HALFSTEP_TORCH_ROOT; a find_package(Torch) that has run already; the
# torch beside an installed halfstep; Torch_DIR and CMAKE_PREFIX_PATH.
#
#   halfstep_libtorch       headers, torch_cpu, c10
#   halfstep_libtorch_cuda  torch_cuda, kept even if unreferenced: a C++ program needs it to find a GPU (if present)
#   halfstep_c10_cuda       c10_cuda and cudart (if present)
#   halfstep_cudart         cudart alone (if present)
#
# and HALFSTEP_TORCH_VERSION (2.11.0), HALFSTEP_TORCH_MINOR (2.11), and where cudart lies as seen from the folder that
# holds torch, HALFSTEP_CUDART_FROM_SITE (nvidia/cu13/lib).

function(_halfstep_import name)
  if(NOT TARGET ${name})
    add_library(${name} INTERFACE IMPORTED GLOBAL)
  endif()
endfunction()

macro(halfstep_find_torch)
  if(NOT HALFSTEP_TORCH_ROOT)
    set(_halfstep_hints ${TORCH_INSTALL_PREFIX})
    list(APPEND _halfstep_hints "${CMAKE_CURRENT_LIST_DIR}/../../../torch") # site-packages/halfstep/torch-X.Y/cmake
    file(GLOB _halfstep_venv "${CMAKE_CURRENT_LIST_DIR}/.venv/lib/python3*/site-packages/torch") # after make
    list(APPEND _halfstep_hints ${_halfstep_venv})
    foreach(_path IN LISTS Torch_DIR Torch_ROOT CMAKE_PREFIX_PATH)
      list(APPEND _halfstep_hints ${_path} ${_path}/../.. ${_path}/../../.. ${_path}/Torch/../../..)
    endforeach()
    find_path(HALFSTEP_TORCH_ROOT NAMES include/torch/headeronly/version.h HINTS ${_halfstep_hints} NO_DEFAULT_PATH
      DOC "Folder of torch that holds include/ and lib/")
  endif()
  if(NOT HALFSTEP_TORCH_ROOT)
    message(FATAL_ERROR "halfstep: no LibTorch found. Pass -DHALFSTEP_TORCH_ROOT=<folder with include/ and lib/>, or "
      "-DCMAKE_PREFIX_PATH=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')")
  endif()

  file(STRINGS "${HALFSTEP_TORCH_ROOT}/include/torch/headeronly/version.h" _halfstep_numbers
    REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  list(TRANSFORM _halfstep_numbers REPLACE ".* ([0-9]+)$" "\\1")
  list(JOIN _halfstep_numbers "." HALFSTEP_TORCH_VERSION)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" HALFSTEP_TORCH_MINOR "${HALFSTEP_TORCH_VERSION}")
  if(HALFSTEP_TORCH_VERSION VERSION_LESS 2.11)
    message(FATAL_ERROR "halfstep: LibTorch at ${HALFSTEP_TORCH_ROOT} is ${HALFSTEP_TORCH_VERSION}, expected >= 2.11")
  endif()

  _halfstep_import(halfstep_libtorch)
  set_target_properties(halfstep_libtorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES
      "${HALFSTEP_TORCH_ROOT}/include;${HALFSTEP_TORCH_ROOT}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${HALFSTEP_TORCH_ROOT}/lib/libtorch_cpu.so;${HALFSTEP_TORCH_ROOT}/lib/libc10.so")

  # torch's own libcudart: beside torch in a wheel (nvidia/cuNN/lib), in lib/ of a LibTorch archive.
  file(GLOB HALFSTEP_CUDART LIST_DIRECTORIES false
    "${HALFSTEP_TORCH_ROOT}/../nvidia/cu*/lib/libcudart.so.*" "${HALFSTEP_TORCH_ROOT}/lib/libcudart*.so*")
  if(EXISTS "${HALFSTEP_TORCH_ROOT}/lib/libc10_cuda.so" AND HALFSTEP_CUDART)
    list(GET HALFSTEP_CUDART 0 HALFSTEP_CUDART)
    get_filename_component(_halfstep_cuda_lib "${HALFSTEP_CUDART}" DIRECTORY)
    file(RELATIVE_PATH HALFSTEP_CUDART_FROM_SITE "${HALFSTEP_TORCH_ROOT}/.." "${_halfstep_cuda_lib}")
    _halfstep_import(halfstep_cudart)
    set_target_properties(halfstep_cudart PROPERTIES INTERFACE_LINK_LIBRARIES "${HALFSTEP_CUDART}")
    # Headers: nvcc's own toolkit; nvcc from PyPI has none to tell, its headers lie beside torch's libcudart.
    find_path(HALFSTEP_CUDA_INCLUDE cuda_runtime.h
      HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} "${_halfstep_cuda_lib}/../include" NO_DEFAULT_PATH)
    if(HALFSTEP_CUDA_INCLUDE)
      set_target_properties(halfstep_cudart PROPERTIES
        INTERFACE_INCLUDE_DIRECTORIES "${HALFSTEP_CUDA_INCLUDE}")
    endif()
    _halfstep_import(halfstep_c10_cuda)
    set_target_properties(halfstep_c10_cuda PROPERTIES
      INTERFACE_LINK_LIBRARIES "${HALFSTEP_TORCH_ROOT}/lib/libc10_cuda.so;halfstep_cudart")
    _halfstep_import(halfstep_libtorch_cuda)
    # torch_cuda's own dependencies (cuBLAS, cuDNN ...) are found through its RUNPATH at run time.
    set_target_properties(halfstep_libtorch_cuda PROPERTIES
      INTERFACE_LINK_LIBRARIES "${HALFSTEP_TORCH_ROOT}/lib/libtorch_cuda.so"
      INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed;LINKER:--allow-shlib-undefined")
  elseif(HALFSTEP_CUDA)
    message(FATAL_ERROR "halfstep: HALFSTEP_CUDA=ON, but the LibTorch at ${HALFSTEP_TORCH_ROOT} has no CUDA")
  endif()
endmacro()
