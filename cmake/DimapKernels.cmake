# The kernels know no torch: raw pointers in and out. Each instruction set is one translation unit with its own flags.
set(_csrc ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
file(GLOB_RECURSE _sources CONFIGURE_DEPENDS ${_csrc}/core/*.cpp ${_csrc}/cpu/*.cpp)
list(FILTER _sources EXCLUDE REGEX "_(avx2|avx512)\\.cpp$")
add_library(dimap_kernels STATIC ${_sources})
target_include_directories(dimap_kernels PUBLIC ${_csrc})
# A fused multiply-add rounds once where the specification rounds twice.
target_compile_options(dimap_kernels PRIVATE -O3 -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  file(GLOB _avx2_sources CONFIGURE_DEPENDS ${_csrc}/cpu/isa/*_avx2.cpp)
  file(GLOB _avx512_sources CONFIGURE_DEPENDS ${_csrc}/cpu/isa/*_avx512.cpp)
  target_sources(dimap_kernels PRIVATE ${_avx2_sources} ${_avx512_sources})
  target_compile_definitions(dimap_kernels PUBLIC DIMAP_X86)
  set(_avx2 -mavx2 -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt)
  set_source_files_properties(${_avx2_sources} PROPERTIES COMPILE_OPTIONS "${_avx2}")
  # GCC 12 takes its own intrinsics' undefined operands for uninitialised variables.
  set_source_files_properties(
    ${_avx512_sources}
    PROPERTIES COMPILE_OPTIONS
               "${_avx2};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-Wno-uninitialized;-Wno-maybe-uninitialized")
endif()
target_link_libraries(dimap_kernels PUBLIC Threads::Threads)
