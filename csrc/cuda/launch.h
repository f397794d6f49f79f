// Launches, with the launch's own error as the result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plan.h"

namespace dimap::cuda {

// As many blocks as there is work for, of at most `most`.
inline unsigned blocks_for(int64_t work, int64_t most) {
  return static_cast<unsigned>(work < 1 ? 1 : work < most ? work : most);
}

struct Shape {
  int threads = kThreads;    // in a block
  size_t shared = 0;         // bytes of dynamic shared memory of a block
  bool cooperative = false;  // all blocks are resident at the same time and may wait for each other, or none starts
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(const Shape& shape, void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream, const Arguments&... arguments) {
  return launch_with({}, kernel, blocks, stream, arguments...);
}

// Lets a kernel's blocks have so many bytes of dynamic shared memory.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// How many blocks of a kernel the current device holds at a time.
template <typename Kernel>
cudaError_t resident(Kernel kernel, int64_t* blocks, int threads = kThreads, size_t shared = 0) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  *blocks = int64_t{processors} * each > 0 ? int64_t{processors} * each : 1;
  return error;
}

}  // namespace dimap::cuda
