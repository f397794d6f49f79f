// Host bytes to the device, inside the arguments of kernels.
#include <cstring>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

// CUDA 12.1 and later take 32,764 bytes of arguments, earlier ones 4 KiB.
constexpr int kPayload = CUDART_VERSION >= 12010 ? 30720 : 3840;

struct Payload {
  uint64_t words[kPayload / 8];
};

__global__ void upload_kernel(uint64_t* to, int words, const __grid_constant__ Payload payload) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < words) to[i] = payload.words[i];
}

}  // namespace

cudaError_t upload(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  Payload payload = {};
  for (int64_t at = 0; at < bytes; at += kPayload) {
    const int64_t part = bytes - at < kPayload ? bytes - at : kPayload;
    std::memcpy(payload.words, static_cast<const char*>(from) + at, static_cast<size_t>(part));
    if (const cudaError_t error =
            launch(upload_kernel, static_cast<unsigned>((part / 8 + kThreads) / kThreads), stream,
                   reinterpret_cast<uint64_t*>(static_cast<char*>(to) + at), static_cast<int>((part + 7) / 8), payload);
        error != cudaSuccess)
      return error;
  }
  return cudaSuccess;
}

}  // namespace dimap::cuda
