// The deciding read: writes the mask where it is certain, sums what is kept, sets aside the few weights in between.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/survey.cuh"

namespace dimap::cuda {
namespace {

// One chunk of a layer whose bracket holds. mask: bytes, or null.
template <DType kType, bool kMask>
__device__ __forceinline__ void read_chunk(const storage_t<kType>* weights, int n, const Bracket& bracket,
                                           uint8_t* mask, const Slot<kType>& slot, uint32_t* aside, Above& t,
                                           Word* row) {
  using T = storage_t<kType>;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T)), kUnroll = kOccupancy.read_unroll;
  auto decide = [&](T bits, int i) -> uint32_t {
    const uint32_t key = key_of<kType>(bits);
    t.largest = key > t.largest ? key : t.largest;
    if (key >= t.end) {
      see_above(key, t, row);
    } else if (key >= t.base) {
      const uint32_t place = atomicAdd(aside, 1u);
      if (place < static_cast<uint32_t>(slot.capacity)) slot.put(place, bits, i);
    }
    return key >= bracket.mark ? 1u : 0u;
  };
  int done = 0;
  if (reinterpret_cast<uintptr_t>(weights) % 16 == 0 && (!kMask || reinterpret_cast<uintptr_t>(mask) % 8 == 0)) {
    const uint4* vectors = reinterpret_cast<const uint4*>(weights);
    const int count = n / kLanes;
    for (int start = static_cast<int>(threadIdx.x); start < count; start += kThreads * kUnroll) {
      uint4 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (start + u * kThreads < count) v[u] = vectors[start + u * kThreads];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = start + u * kThreads;
        if (at >= count) continue;
        const uint32_t words[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
        uint32_t bytes[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          const T bits = sizeof(T) == 4 ? static_cast<T>(words[k % 4]) : static_cast<T>(words[k / 2] >> (k % 2 * 16));
          bytes[k / 4] |= decide(bits, at * kLanes + k) << (k % 4 * 8);
        }
        if constexpr (kMask && kLanes == 4) reinterpret_cast<uint32_t*>(mask)[at] = bytes[0];
        if constexpr (kMask && kLanes == 8) reinterpret_cast<uint2*>(mask)[at] = make_uint2(bytes[0], bytes[1]);
      }
    }
    done = count * kLanes;
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    const uint32_t byte = decide(weights[i], i);
    if constexpr (kMask) mask[i] = static_cast<uint8_t>(byte);
  }
}

// Each block reads the chunks of one range, in order.
template <bool kMask>
__global__ void __launch_bounds__(kThreads, kOccupancy.read_blocks) read_kernel(const __grid_constant__ ReadArgs a) {
  __shared__ SurveyShared<> s;
  const int64_t first = a.plan.chunks * blockIdx.x / gridDim.x, last = a.plan.chunks * (blockIdx.x + 1) / gridDim.x;
  clear_bins(s);
  if (first >= last) return;
  const int64_t columns = kHead + 3 * static_cast<int64_t>(a.bins);
  Above t;
  t.largest = 0;
  int32_t tensor = tensor_of(a.plan, first), layer = -1;
  uint32_t binned = 0;  // weights in the bins since they were last flushed: they hold 2^16 - 1
  int bins = 0, turn = 0;
  Bracket bracket{};
  Word* row = nullptr;
  auto flush = [&] {
    if (layer < 0) return;
    flush_bins(s, row, bins);
    flush_above(t, row);
    binned = 0;
  };
  for (int64_t c = first; c < last; ++c, turn = (turn + 1) % 3) {
    while (a.plan.tensors[tensor + 1].first_chunk <= c) ++tensor;
    const TensorEntry entry = a.plan.tensors[tensor];
    if (entry.layer != layer) {
      flush();
      layer = entry.layer;
      row = a.table + layer * columns;
      bins = static_cast<int>(a.layers[layer].view.bins);
      bracket = a.layers[layer].bracket;
      t.look_through(a.layers[layer].view);
    }
    const int64_t offset = (c - entry.first_chunk) * kChunk;
    const int n = static_cast<int>(entry.numel - offset < kChunk ? entry.numel - offset : kChunk);
    uint32_t* aside = &s.aside[turn];
    for_type(entry.dtype, [&]<DType kType>() {
      const auto* weights = static_cast<const storage_t<kType>*>(entry.data) + offset;
      const Slot<kType> slot(a.aside, c);
      if (bracket.holds) {
        uint8_t* mask = kMask ? static_cast<uint8_t*>(entry.out) + offset : nullptr;
        read_chunk<kType, kMask>(weights, n, bracket, mask, slot, aside, t, row);
      } else {
        survey_chunk<kType>(entry, offset, n, t, s, row);
        const uint32_t inside = __reduce_add_sync(0xFFFFFFFFu, t.inside);
        t.inside = 0;
        if (threadIdx.x % 32 == 0 && inside) atomicAdd(aside, inside);
      }
      __syncthreads();  // the one barrier of a chunk: the counter of the chunk after the next is free from here on
      if (threadIdx.x == 0) s.aside[(turn + 2) % 3] = 0;
      const uint32_t inside = *aside;
      binned += inside;
      const bool kept = bracket.holds && inside <= static_cast<uint32_t>(slot.capacity);
      if (kept) {
        for (uint32_t i = threadIdx.x; i < inside; i += kThreads) see_inside(slot.key(static_cast<int>(i)), t, s);
      } else if (bracket.holds) {
        for_each_key<kType, kOccupancy.emit_unroll>(weights, n, [&](uint32_t key, int) {
          if (key >= t.base && key < t.end) see_inside(key, t, s);
        });
      }
      if (threadIdx.x == 0) a.aside.count[c] = kept ? static_cast<int32_t>(inside) : kOverrun;
    });
    if (binned > 65535u - kChunk) {
      flush_bins(s, row, bins);
      binned = 0;
    }
  }
  flush();
  if (t.largest >= kNonFinite) atomicMax(a.bad, kBadWeights);
}

}  // namespace

cudaError_t read(const ReadArgs& args, bool masks, cudaStream_t stream) {
  const auto kernel = masks ? read_kernel<true> : read_kernel<false>;
  int64_t most = 1;
  if (const cudaError_t error = resident(kernel, &most); error != cudaSuccess) return error;
  return launch(kernel, blocks_for(args.plan.chunks, most), stream, args);
}

}  // namespace dimap::cuda
