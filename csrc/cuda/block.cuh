// What a block of threads does together: phases, vector loads, sums.
#pragma once

#include "cuda/plan.h"

namespace dimap::cuda {

// Runs the solver's phases on a block (see solver.h).
struct BlockExec {
  template <typename F>
  __device__ void each(int64_t n, F&& f) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }
  template <typename F>
  __device__ void one(F&& f) {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  __device__ void add(Word* to, Word value) { atomicAdd(to, value); }
  __device__ void add(int32_t* to, int32_t value) { atomicAdd(to, value); }
  __device__ void max(Word* to, Word value) { atomicMax(to, value); }
};

// Which of `count` entries holds a piece of work: the last whose first one is at most that (empty ones hold none).
// There is one entry more, whose first piece is one past all.
template <typename Entry>
__device__ inline int32_t holder_of(const Entry* entries, int32_t count, int64_t Entry::* first, int64_t piece) {
  int32_t from = 0, to = count;
  while (from < to) {
    const int32_t middle = from + (to - from) / 2;
    if (entries[middle + 1].*first <= piece)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}
__device__ inline int32_t tensor_of(const Plan& plan, int64_t chunk) {
  return holder_of(plan.tensors, plan.tensor_count, &TensorEntry::first_chunk, chunk);
}

// Calls f.operator()<kType>() for a tensor's type.
template <typename F>
__device__ __forceinline__ void for_type(int32_t dtype, F&& f) {
  if (static_cast<DType>(dtype) == DType::kFloat32) f.template operator()<DType::kFloat32>();
  if (static_cast<DType>(dtype) == DType::kBFloat16) f.template operator()<DType::kBFloat16>();
  if (static_cast<DType>(dtype) == DType::kFloat16) f.template operator()<DType::kFloat16>();
}

// Calls f(key, i) for the weights of a chunk, all kCount threads of the block together, in no order.
template <DType kType, int kUnroll, int kCount = kThreads, typename F>
__device__ __forceinline__ void for_each_key(const void* data, int n, F&& f) {
  using T = storage_t<kType>;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  const T* weights = static_cast<const T*>(data);
  int done = 0;
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    const uint4* vectors = static_cast<const uint4*>(data);
    const int count = n / kLanes;
    for (int start = static_cast<int>(threadIdx.x); start < count; start += kCount * kUnroll) {
      uint4 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (start + u * kCount < count) v[u] = vectors[start + u * kCount];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = start + u * kCount;
        if (at >= count) continue;
        const uint32_t words[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          if constexpr (sizeof(T) == 4)
            f(key_of<kType>(words[k]), at * kLanes + k);
          else
            f(key_of<kType>(static_cast<T>(words[k / 2] >> (k % 2 * 16))), at * kLanes + k);
        }
      }
    }
    done = count * kLanes;
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < n; i += kCount) f(key_of<kType>(weights[i]), i);
}

__device__ inline Word warp_sum(Word value) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// Sums over the threads before, of a block of kCount warps, in a fixed order. total: of all. Never a difference: what
// comes before may be far less than a thread's own.
template <int kCount, typename T>
__device__ T block_scan(T value, T& total) {
  __shared__ T warps[kCount];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(0xFFFFFFFFu, value, offset);
    if (lane >= offset) value += other;
  }
  __syncthreads();  // of an earlier call
  if (lane == 31) warps[warp] = value;
  T before = __shfl_up_sync(0xFFFFFFFFu, value, 1);
  if (lane == 0) before = T{};
  __syncthreads();
  T warps_before{};
  total = T{};
#pragma unroll
  for (int w = 0; w < kCount; ++w) {
    if (w < warp) warps_before += warps[w];
    total += warps[w];
  }
  return warps_before + before;
}

alignas(16) extern __shared__ uint32_t dynamic_shared[];

}  // namespace dimap::cuda
