// Scores of layers of one 16-bit type: an exact histogram of their magnitudes and a table. Sums have a fixed order.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

constexpr int kMagnitudes = 1 << 15;
constexpr int kHistogramBytes = kMagnitudes * 4;

// kShared: counts go to the block's own histogram first, where the device has room for it.
template <DType kType, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) magnitudes_kernel(const __grid_constant__ TableArgs a) {
  uint32_t* mine = dynamic_shared;  // [kMagnitudes]
  const int64_t first = a.plan.chunks * blockIdx.x / gridDim.x, last = a.plan.chunks * (blockIdx.x + 1) / gridDim.x;
  if (first >= last) return;
  if constexpr (kShared) {
    for (int i = static_cast<int>(threadIdx.x); i < kMagnitudes; i += kThreads) mine[i] = 0;
    __syncthreads();
  }
  int32_t tensor = tensor_of(a.plan, first), layer = a.plan.tensors[tensor].layer;
  auto flush = [&] {
    if constexpr (kShared) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kMagnitudes; i += kThreads) {
        if (mine[i]) atomicAdd(a.histogram + int64_t{layer} * kMagnitudes + i, mine[i]);
        mine[i] = 0;
      }
      __syncthreads();
    }
  };
  for (int64_t c = first; c < last; ++c) {
    while (a.plan.tensors[tensor + 1].first_chunk <= c) ++tensor;
    const TensorEntry entry = a.plan.tensors[tensor];
    if (entry.layer != layer) {
      flush();
      layer = entry.layer;
    }
    uint32_t* counts = kShared ? mine : a.histogram + int64_t{layer} * kMagnitudes;
    const int64_t offset = entry.begin_of(c);
    const int n = entry.count_of(c);
    // As bfloat16, the key's upper half is the 15 bits themselves: the same for float16 bits, which are not looked into
    // here.
    for_each_key<DType::kBFloat16, kOccupancy.unroll>(static_cast<const uint16_t*>(entry.data) + offset, n,
                                                      [&](uint32_t key, int) { atomicAdd(counts + (key >> 16), 1u); });
  }
  flush();
}

// A block for a layer: running sums from the largest magnitude down, then the scores of all magnitudes.
template <DType kType>
__global__ void __launch_bounds__(kThreads) table_kernel(const __grid_constant__ TableArgs a) {
  constexpr int kEach = kMagnitudes / kThreads;
  __shared__ double sums[kThreads];
  for (int32_t layer = static_cast<int32_t>(blockIdx.x); layer < a.plan.layer_count;
       layer += static_cast<int32_t>(gridDim.x)) {
    const uint32_t* counts = a.histogram + int64_t{layer} * kMagnitudes;
    float* table = a.table + int64_t{layer} * kMagnitudes;
    const int top = kMagnitudes - 1 - static_cast<int>(threadIdx.x) * kEach;
    double energy = 0;
    bool bad = false;
    for (int i = 0; i < kEach; ++i) {
      if (counts[top - i] == 0) continue;
      const uint32_t key = key_of<kType>(static_cast<uint16_t>(top - i));
      if (key >= kNonFinite)
        bad = true;
      else
        energy += counts[top - i] * squared_value(key);
    }
    if (bad) atomicMax(a.bad, kBadWeights);
    sums[threadIdx.x] = energy;
    __syncthreads();
    if (threadIdx.x == 0) {
      double before = 0;
      for (int t = 0; t < kThreads; ++t) {
        const double mine = sums[t];
        sums[t] = before;
        before += mine;
      }
    }
    __syncthreads();
    energy = sums[threadIdx.x];
    for (int i = 0; i < kEach; ++i) {
      if (counts[top - i] == 0) continue;
      const uint32_t key = key_of<kType>(static_cast<uint16_t>(top - i));
      if (key >= kNonFinite) continue;
      energy += counts[top - i] * squared_value(key);
      table[top - i] = static_cast<float>(score64(key, energy));
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) look_up_kernel(const __grid_constant__ TableArgs a) {
  if (*a.bad != 0) return;  // the table has no entry for an infinity or a NaN
  for (int64_t c = blockIdx.x; c < a.plan.chunks; c += gridDim.x) {
    const TensorEntry entry = a.plan.tensors[tensor_of(a.plan, c)];
    const int64_t offset = entry.begin_of(c);
    const int n = entry.count_of(c);
    const float* table = a.table + int64_t{entry.layer} * kMagnitudes;
    const auto* weights = static_cast<const uint16_t*>(entry.data) + offset;
    auto* scores = static_cast<float*>(entry.out) + offset;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) scores[i] = __ldg(table + (weights[i] & 0x7FFF));
  }
}

template <DType kType>
cudaError_t by_table(const TableArgs& a, cudaStream_t stream) {
  int device = 0, room = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(a.histogram, 0, static_cast<size_t>(a.plan.layer_count) * kHistogramBytes, stream);
  if (error != cudaSuccess) return error;
  if (room >= kHistogramBytes) {
    error = cudaFuncSetAttribute(magnitudes_kernel<kType, true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kHistogramBytes);
    if (error == cudaSuccess)
      error = launch_with({.shared = kHistogramBytes}, magnitudes_kernel<kType, true>,
                          blocks_for(a.plan.chunks, processors), stream, a);
  } else {
    error = launch(magnitudes_kernel<kType, false>, blocks_for(a.plan.chunks, 4 * processors), stream, a);
  }
  if (error == cudaSuccess) error = launch(table_kernel<kType>, blocks_for(a.plan.layer_count, 1 << 14), stream, a);
  if (error == cudaSuccess) error = launch(look_up_kernel, blocks_for(a.plan.chunks, 1 << 14), stream, a);
  return error;
}

}  // namespace

cudaError_t score_by_table(const TableArgs& args, cudaStream_t stream) {
  return args.dtype == DType::kBFloat16 ? by_table<DType::kBFloat16>(args, stream)
                                        : by_table<DType::kFloat16>(args, stream);
}

}  // namespace dimap::cuda
