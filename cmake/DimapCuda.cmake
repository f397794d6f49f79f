# The CUDA library: a target of its own, loaded only where torch has CUDA. The compiler is probed, never a GPU.
set(DIMAP_CUDA_VERSION "")
set(DIMAP_CUDA_ARCHITECTURES "")
if(NOT DIMAP_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(DIMAP_CUDA STREQUAL "ON" AND NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "dimap: DIMAP_CUDA=ON needs a CUDA compiler (nvcc), found none. "
                        "Put nvcc on the PATH, set CUDACXX, or use DIMAP_CUDA=OFF")
  endif()
endif()
message(STATUS "dimap: DIMAP_CUDA=${DIMAP_CUDA}, building without CUDA")
