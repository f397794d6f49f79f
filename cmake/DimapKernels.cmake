# The kernels know no torch: raw pointers in and out. Each instruction set is one translation unit with its own flags.
set(_cpu ${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/cpu)
add_library(
  dimap_kernels STATIC
  ${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/solve.cpp
  ${_cpu}/apply.cpp ${_cpu}/bracket.cpp ${_cpu}/count.cpp ${_cpu}/decide_portable.cpp ${_cpu}/dispatch.cpp ${_cpu}/emit.cpp ${_cpu}/engine.cpp ${_cpu}/large_pages.cpp
  ${_cpu}/pack.cpp ${_cpu}/parted.cpp ${_cpu}/reading.cpp ${_cpu}/rows_portable.cpp ${_cpu}/sample.cpp
  ${_cpu}/score.cpp ${_cpu}/score_buckets.cpp ${_cpu}/score_sort.cpp ${_cpu}/score_table.cpp ${_cpu}/sketch.cpp
  ${_cpu}/survey.cpp)
# A fused multiply-add rounds once where the specification rounds twice.
target_compile_options(dimap_kernels PRIVATE -O3 -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(_avx2_sources ${_cpu}/decide_avx2.cpp ${_cpu}/rows_avx2.cpp)
  set(_avx512_sources ${_cpu}/decide_avx512.cpp ${_cpu}/rows_avx512.cpp)
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
