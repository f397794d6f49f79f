// The part of the CUDA runtime that dimap calls, on the host: streams are the order of the calls.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "emulator.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  void* stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
using cudaStream_t = void*;
#define CUDART_VERSION 12080

namespace emulator {
// Each block of a cooperative grid has a thread of the system.
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
// ... of the source, or of the PTX that goes by the kernel's address (../ptx/ptx.cpp).
cudaError_t launch_any(const cudaLaunchConfig_t& config, void* kernel, const std::function<void()>& source,
                       const char* parameters, size_t bytes);
int resident(void* kernel, unsigned threads, size_t dynamic);
void allow_shared(void* kernel, int bytes);
constexpr int kProcessors = 3;
extern "C" {
// How often the host waited, or lent its memory to a copy: what no graph can replay. And the bytes of these copies.
extern int dimap_emulated_host_calls, dimap_emulated_host_bytes;
extern int dimap_emulated_shared;  // bytes of shared memory that a block may ask for
}
}  // namespace emulator

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  std::vector<char> parameters(1 << 16);
  size_t at = 0;
  const auto pack = [&](auto value) {
    at = (at + alignof(decltype(value)) - 1) / alignof(decltype(value)) * alignof(decltype(value));
    std::memcpy(parameters.data() + at, &value, sizeof value);
    at += sizeof value;
  };
  (pack(static_cast<std::remove_cv_t<Expected>>(arguments)), ...);
  return emulator::launch_any(
      *config, reinterpret_cast<void*>(kernel), [&] { kernel(arguments...); }, parameters.data(), at);
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::kProcessors : emulator::dimap_emulated_shared;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel kernel, int threads, size_t dynamic) {
  *blocks = emulator::resident(reinterpret_cast<void*>(kernel), static_cast<unsigned>(threads), dynamic);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  return emulator::allow_shared(reinterpret_cast<void*>(kernel), bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyDeviceToDevice) {
    ++emulator::dimap_emulated_host_calls;
    emulator::dimap_emulated_host_bytes += static_cast<int>(bytes);
  }
  emulator::mark(to, bytes, false);
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  emulator::mark(to, bytes, false);
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++emulator::dimap_emulated_host_calls;
  return cudaSuccess;
}
