// Scores of layers of one 16-bit type, in three launches for all of their tensors: an exact histogram of each layer's
// magnitudes, a table of their scores, and a look at the table for each weight. Sums have a fixed order.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

constexpr int kMagnitudes = 1 << 15;
constexpr size_t kTableBytes = kMagnitudes * 4;  // of counts, or of scores
constexpr int kTableThreads = kTuning.table_threads;
constexpr int kLoads = 2;                // of 16 bytes, in flight in a thread
constexpr int kQuads = 4;                // of four weights, in flight in a thread
constexpr uint32_t kMagnitude = 0x7FFF;  // of a 16-bit weight's bits

// Counts of magnitudes: [layers, kMagnitudes]. Each block takes one range of chunks, in order. kShared: a layer's
// counts go to the block's own histogram first, where the device has room for it.
template <bool kShared>
__global__ void __launch_bounds__(kTableThreads, 1) magnitudes_kernel(const __grid_constant__ TableArgs a) {
  uint32_t* mine = dynamic_shared;  // [kMagnitudes]
  const int64_t first = a.plan.chunks * blockIdx.x / gridDim.x, last = a.plan.chunks * (blockIdx.x + 1) / gridDim.x;
  if (first >= last) return;
  if constexpr (kShared) {
    for (int i = static_cast<int>(threadIdx.x); i < kMagnitudes; i += kTableThreads) mine[i] = 0;
    __syncthreads();
  }
  int32_t tensor = tensor_of(a.plan, first), layer = a.plan.tensors[tensor].layer;
  auto flush = [&] {
    if constexpr (kShared) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kMagnitudes; i += kTableThreads) {
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
    // As bfloat16, the key's upper half is the 15 bits themselves: the same for float16 bits, which are not looked into
    // here.
    for_each_key<DType::kBFloat16, kLoads, kTableThreads>(
        static_cast<const uint16_t*>(entry.data) + entry.begin_of(c), entry.count_of(c),
        [&](uint32_t key, int) { atomicAdd(counts + (key >> 16), 1u); });
  }
  flush();
}

// Scores of magnitudes: [layers, kMagnitudes]. A block for a layer takes tiles from the largest magnitudes down, four
// neighbours a thread, and knows the energy of the tiles before. Those that no weight has score 0.
template <DType kType>
__global__ void __launch_bounds__(kTableThreads, 1) table_kernel(const __grid_constant__ TableArgs a) {
  constexpr int kTiles = kMagnitudes / 4 / kTableThreads;
  static_assert(kTiles * 4 * kTableThreads == kMagnitudes);
  for (int32_t layer = static_cast<int32_t>(blockIdx.x); layer < a.plan.layer_count;
       layer += static_cast<int32_t>(gridDim.x)) {
    const auto* counts = reinterpret_cast<const uint4*>(a.histogram + int64_t{layer} * kMagnitudes);
    auto* table = reinterpret_cast<float4*>(a.table + int64_t{layer} * kMagnitudes);
    double above = 0;
    bool bad = false;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int place = kMagnitudes / 4 - 1 - tile * kTableThreads - static_cast<int>(threadIdx.x);
      const uint4 four = counts[place];
      const uint32_t count[4] = {four.w, four.z, four.y, four.x};  // magnitudes fall
      uint32_t key[4];
      double energy[4], sum = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        key[k] = key_of<kType>(static_cast<uint16_t>(4 * place + 3 - k));
        if (key[k] < kNonFinite)
          sum += count[k] * squared_value(key[k]);
        else
          bad |= count[k] != 0;
        energy[k] = sum;
      }
      double all;
      const double before = above + block_scan<kTableThreads / 32>(sum, all);
      float score[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        score[k] = count[k] && key[k] < kNonFinite ? static_cast<float>(score64(key[k], before + energy[k])) : 0.0f;
      table[place] = make_float4(score[3], score[2], score[1], score[0]);
      above += all;
    }
    if (bad) atomicMax(a.bad, kBadWeights);
  }
}

// Scores of weights. Each block takes one range of chunks, in order. kShared: a layer's table is copied to the block,
// where the device has room for it. A thread takes four neighbours at a time: their scores are the 16 bytes of a store,
// and those of a warp lie side by side.
template <bool kShared>
__global__ void __launch_bounds__(kTableThreads, 1) look_up_kernel(const __grid_constant__ TableArgs a) {
  if (*a.bad != 0) return;
  const int64_t first = a.plan.chunks * blockIdx.x / gridDim.x, last = a.plan.chunks * (blockIdx.x + 1) / gridDim.x;
  if (first >= last) return;
  const int me = static_cast<int>(threadIdx.x);
  int32_t tensor = tensor_of(a.plan, first), layer = -1;
  const float* table = nullptr;
  for (int64_t c = first; c < last; ++c) {
    while (a.plan.tensors[tensor + 1].first_chunk <= c) ++tensor;
    const TensorEntry entry = a.plan.tensors[tensor];
    if (entry.layer != layer) {
      layer = entry.layer;
      table = a.table + int64_t{layer} * kMagnitudes;
      if constexpr (kShared) {
        __syncthreads();  // nobody looks at the last layer's any more
        for (int i = me; i < kMagnitudes / 4; i += kTableThreads)
          reinterpret_cast<uint4*>(dynamic_shared)[i] = reinterpret_cast<const uint4*>(table)[i];
        __syncthreads();
      }
    }
    const auto score_of = [&](uint32_t bits) {
      if constexpr (kShared) return __uint_as_float(dynamic_shared[bits & kMagnitude]);
      return __ldg(table + (bits & kMagnitude));
    };
    const auto* weights = static_cast<const uint16_t*>(entry.data) + entry.begin_of(c);
    auto* scores = static_cast<float*>(entry.out) + entry.begin_of(c);
    const int n = entry.count_of(c);
    int done = 0;
    if (reinterpret_cast<uintptr_t>(weights) % 8 == 0 && reinterpret_cast<uintptr_t>(scores) % 16 == 0) {
      const auto* quads = reinterpret_cast<const uint2*>(weights);
      const int count = n / 4;
      for (int start = me; start < count; start += kTableThreads * kQuads) {
        uint2 v[kQuads];
#pragma unroll
        for (int u = 0; u < kQuads; ++u)
          if (start + u * kTableThreads < count) v[u] = __ldcs(quads + start + u * kTableThreads);
#pragma unroll
        for (int u = 0; u < kQuads; ++u)
          if (const int at = start + u * kTableThreads; at < count)
            reinterpret_cast<float4*>(scores)[at] =
                make_float4(score_of(v[u].x), score_of(v[u].x >> 16), score_of(v[u].y), score_of(v[u].y >> 16));
      }
      done = count * 4;
    }
    for (int i = done + me; i < n; i += kTableThreads) scores[i] = score_of(weights[i]);
  }
}

template <bool kShared>
cudaError_t by_table(const TableArgs& a, int processors, cudaStream_t stream) {
  const Shape shape{.threads = kTableThreads, .shared = kShared ? kTableBytes : 0};
  const unsigned blocks = blocks_for(a.plan.chunks, processors);
  const auto table = a.dtype == DType::kBFloat16 ? table_kernel<DType::kBFloat16> : table_kernel<DType::kFloat16>;
  cudaError_t error = cudaSuccess;
  if constexpr (kShared) {
    error = allow_shared(magnitudes_kernel<true>, kTableBytes);
    if (error == cudaSuccess) error = allow_shared(look_up_kernel<true>, kTableBytes);
  }
  if (error == cudaSuccess) error = launch_with(shape, magnitudes_kernel<kShared>, blocks, stream, a);
  if (error == cudaSuccess)
    error = launch_with({.threads = kTableThreads}, table, blocks_for(a.plan.layer_count, kMostBlocks), stream, a);
  if (error == cudaSuccess) error = launch_with(shape, look_up_kernel<kShared>, blocks, stream, a);
  return error;
}

}  // namespace

cudaError_t score_by_table(const TableArgs& args, cudaStream_t stream) {
  int device = 0, room = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaMemsetAsync(args.histogram, 0, static_cast<size_t>(args.plan.layer_count) * kTableBytes, stream);
  if (error != cudaSuccess) return error;
  return static_cast<size_t>(room) >= kTableBytes ? by_table<true>(args, processors, stream)
                                                  : by_table<false>(args, processors, stream);
}

}  // namespace dimap::cuda
