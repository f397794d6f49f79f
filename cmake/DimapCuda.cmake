# The CUDA library: a target of its own, loaded only where torch has CUDA. The compiler is probed, never a GPU.
set(DIMAP_CUDA_VERSION "")
set(DIMAP_CUDA_BUILT_FOR "")

# nvcc may be a script that stands somewhere else: the toolkit's folder is where nvcc itself says it is.
function(dimap_find_nvcc result)
  set(found "")
  find_program(_nvcc nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda NO_CACHE)
  if(CMAKE_CUDA_COMPILER)
    set(_nvcc ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(_nvcc $ENV{CUDACXX})
  endif()
  if(_nvcc)
    execute_process(COMMAND ${_nvcc} --dryrun -x cu /dev/null ERROR_VARIABLE dry OUTPUT_QUIET RESULT_VARIABLE failed)
    if(NOT failed AND dry MATCHES "TOP=([^\n]+)")
      string(STRIP "${CMAKE_MATCH_1}" root)
      get_filename_component(root "${root}" ABSOLUTE)
      if(EXISTS ${root}/bin/nvcc)
        set(found ${root}/bin/nvcc)
      endif()
    endif()
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

# `all` and `native` as numbers: nvcc's own `all` has architectures that dimap does not, and what a machine without a
# GPU would take for `native` differs with CMake.
function(dimap_name_architectures)
  set(named ${CMAKE_CUDA_ARCHITECTURES})
  if(named STREQUAL "all" OR named STREQUAL "all-major")
    set(named 80-real 86-real 89-real 90 100-real 120)  # and PTX of 90 and 120
  elseif(named STREQUAL "native")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE said
                    ERROR_QUIET RESULT_VARIABLE failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" said "${said}")
    if(failed OR NOT said)
      message(FATAL_ERROR "dimap: CMAKE_CUDA_ARCHITECTURES (or CUDAARCHS) may be native where nvidia-smi lists a GPU, "
                          "got none: give numbers, as 80-real;90, or all")
    endif()
    list(REMOVE_DUPLICATES said)
    list(SORT said COMPARE NATURAL)
    string(REPLACE "." "" named "${said}")
  endif()
  foreach(architecture IN LISTS named)
    if(NOT architecture MATCHES "^([0-9]+)[af]?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
      message(FATAL_ERROR "dimap: CMAKE_CUDA_ARCHITECTURES (or CUDAARCHS) must be all, native or numbers from 80 on, "
                          "as 80-real;90, got ${architecture}")
    endif()
  endforeach()
  set(CMAKE_CUDA_ARCHITECTURES ${named} PARENT_SCOPE)
endfunction()

set(_why "DIMAP_CUDA=OFF")
set(_build OFF)
if(NOT DIMAP_CUDA STREQUAL "OFF")
  dimap_find_nvcc(_found)
  if(_found)
    set(CMAKE_CUDA_COMPILER ${_found})
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      if(NOT "$ENV{CUDAARCHS}" STREQUAL "")
        set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
      else()
        set(CMAKE_CUDA_ARCHITECTURES 80-real;90)  # code for 8.x and 9.0; the driver makes others' of the PTX
      endif()
    endif()
    dimap_name_architectures()
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake learnt of it in 3.25.2, nvcc in 12.0
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    set(_build ON)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      set(_build OFF)
      set(_why "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0")
    endif()
  else()
    set(_why "no working nvcc on the PATH, in CUDACXX or in CUDA_HOME")
  endif()
endif()

if(_build)
  get_filename_component(_root "${CMAKE_CUDA_COMPILER}" DIRECTORY)
  get_filename_component(_root "${_root}" DIRECTORY)
  message(STATUS "dimap: DIMAP_CUDA=${DIMAP_CUDA}, building for CUDA ${CMAKE_CUDA_COMPILER_VERSION} "
                 "(${CMAKE_CUDA_ARCHITECTURES}) with ${CMAKE_CUDA_COMPILER}")
  set(DIMAP_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
  string(REPLACE ";" " " DIMAP_CUDA_BUILT_FOR "${CMAKE_CUDA_ARCHITECTURES}")
  set(_kernels ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda)
  set(_bindings ${CMAKE_CURRENT_SOURCE_DIR}/csrc/bindings)
  add_library(dimap_cuda MODULE ${_bindings}/cuda_ops.cpp ${_bindings}/cuda_score.cpp ${_bindings}/cuda_stages.cpp
                                ${_kernels}/buckets.cu ${_kernels}/decide.cu ${_kernels}/emit.cu
                                ${_kernels}/nm.cu ${_kernels}/read.cu ${_kernels}/sorted.cu ${_kernels}/stages.cu
                                ${_kernels}/tables.cu ${_kernels}/upload.cu)
  target_include_directories(dimap_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  # USE_CUDA: torch's stable interface declares the current CUDA stream under it.
  target_compile_definitions(dimap_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${DIMAP_TORCH_DEFINITIONS};USE_CUDA>)
  target_include_directories(dimap_cuda SYSTEM PRIVATE
                             "$<$<COMPILE_LANGUAGE:CXX>:${DIMAP_TORCH_INCLUDE};${_root}/include>")
  # The report on registers must show no spills: -warn-spills says so, and warnings are errors with DIMAP_WERROR.
  target_compile_options(dimap_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>"
                         "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;-Xptxas=-warn-spills>")
  if(DIMAP_WERROR)
    target_compile_options(dimap_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Werror>"
                           "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror>")
  endif()
  target_link_libraries(dimap_cuda PRIVATE ${DIMAP_TORCH_LIBRARIES})
  if(EXISTS ${DIMAP_TORCH_LIB}/libtorch_cuda.so)  # the current stream; otherwise found when torch has loaded it
    target_link_libraries(dimap_cuda PRIVATE ${DIMAP_TORCH_LIB}/libtorch_cuda.so)
  endif()
  set_target_properties(dimap_cuda PROPERTIES PREFIX "lib" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
                                              CUDA_RUNTIME_LIBRARY Static CUDA_SEPARABLE_COMPILATION OFF
                                              CUDA_VISIBILITY_PRESET hidden)
elseif(DIMAP_CUDA STREQUAL "ON")
  message(FATAL_ERROR "dimap: DIMAP_CUDA=ON needs a CUDA compiler (nvcc 12.0 or later): ${_why}. "
                      "Put nvcc on the PATH, set CUDACXX, or use DIMAP_CUDA=OFF")
else()
  message(STATUS "dimap: DIMAP_CUDA=${DIMAP_CUDA}, building without CUDA: ${_why}")
endif()
set(DIMAP_CUDA_ARCHITECTURES "${DIMAP_CUDA_BUILT_FOR}")
