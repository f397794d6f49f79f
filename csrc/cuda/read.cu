// The deciding read: writes the mask where it is certain, sums what is kept, sets aside the few weights in between.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/survey.cuh"

namespace dimap::cuda {
namespace {

constexpr int kReadVectors = kOccupancy.read_unroll;  // of 16 bytes, in flight in a thread
constexpr int kLeastUnit = 22;                        // below it the scale is no float32
constexpr int kSumBits = 30;                          // of the integers whose squares are summed four at a time

// kReadVectors vectors of each thread, with no branch but for the few weights inside the bracket and for those far
// above it. The weight over the grid's unit is an integer below 2^kSumBits, so its float32 is exact.
template <DType kType, bool kMask>
__device__ __forceinline__ void read_step(const storage_t<kType>* weights, int offset, const Bracket& bracket,
                                          uint8_t* mask, const Slot<kType>& slot, uint32_t* aside, Above& t,
                                          Far& far_above) {
  using T = storage_t<kType>;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  static_assert(kReadVectors * kLanes <= 32, "a bit of a word for each weight");
  const auto* vectors = reinterpret_cast<const uint4*>(weights);
  const int me = static_cast<int>(threadIdx.x);
  const uint32_t width = t.end - t.base, far = static_cast<uint32_t>(t.unit + 1 + kSumBits - 24 + 1) << 23;
  const uint32_t limit = far < t.limit ? far : t.limit;
  const float scale_to_unit = __uint_as_float(static_cast<uint32_t>(127 + 149 - t.unit) << 23);
  uint4 v[kReadVectors];
#pragma unroll
  for (int u = 0; u < kReadVectors; ++u) v[u] = __ldcs(vectors + me + u * kThreads);
  uint32_t inside = 0, largest = 0, above = 0;  // a bit for each weight inside
#pragma unroll
  for (int u = 0; u < kReadVectors; ++u) {
    const uint32_t words[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
    uint32_t bytes[2] = {0, 0};
#pragma unroll
    for (int four = 0; four < kLanes / 4; ++four) {
      Word sum = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int lane = four * 4 + k;
        uint32_t key;
        if constexpr (sizeof(T) == 4)
          key = key_of<kType>(words[lane % 4]);
        else
          key = key_of<kType>(static_cast<T>(words[lane / 2] >> (lane % 2 * 16)));
        largest = key > largest ? key : largest;
        const float scaled = key >= t.end && key < limit ? __uint_as_float(key) * scale_to_unit : 0.0f;
        const uint32_t q = __float2uint_rz(scaled);
        sum += static_cast<Word>(q) * q;
        bytes[four] |= (key >= bracket.mark ? 1u : 0u) << (8 * k);
        inside |= (key - t.base < width ? 1u : 0u) << (u * kLanes + lane);
      }
      t.low += sum;
      t.high += t.low < sum;
      above += static_cast<uint32_t>(__popc(bytes[four]));
    }
    if constexpr (kMask && kLanes == 4) reinterpret_cast<uint32_t*>(mask)[me + u * kThreads] = bytes[0];
    if constexpr (kMask && kLanes == 8)
      reinterpret_cast<uint2*>(mask)[me + u * kThreads] = make_uint2(bytes[0], bytes[1]);
  }
  const auto place_of = [&](int bit) { return (me + bit / kLanes * kThreads) * kLanes + bit % kLanes; };
  if (largest >= limit) {
#pragma unroll 1
    for (int bit = 0; bit < kReadVectors * kLanes; ++bit) {
      const uint32_t key = key_of<kType>(weights[place_of(bit)]);
      if (key >= limit && key < kNonFinite) see_far(key, far_above);
    }
  }
  t.largest = largest > t.largest ? largest : t.largest;
#pragma unroll 1
  for (; inside; inside &= inside - 1) {
    const int at = place_of(__ffs(static_cast<int>(inside)) - 1);
    const T bits = weights[at];
    above -= key_of<kType>(bits) >= bracket.mark ? 1 : 0;
    const uint32_t place = atomicAdd(aside, 1u);
    if (place < static_cast<uint32_t>(slot.capacity)) slot.put(place, bits, offset + at);
  }
  t.count += above;
}

// One chunk of a layer whose bracket holds. mask: bytes, or null.
template <DType kType, bool kMask>
__device__ __forceinline__ void read_chunk(const storage_t<kType>* weights, int n, const Bracket& bracket,
                                           uint8_t* mask, const Slot<kType>& slot, uint32_t* aside, Above& t,
                                           Far& far_above) {
  using T = storage_t<kType>;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  auto decide = [&](T bits, int i) -> uint32_t {
    const uint32_t key = key_of<kType>(bits);
    t.largest = key > t.largest ? key : t.largest;
    if (key >= t.end) {
      see_above(key, t, [&](uint32_t large) { see_far(large, far_above); });
    } else if (key >= t.base) {
      const uint32_t place = atomicAdd(aside, 1u);
      if (place < static_cast<uint32_t>(slot.capacity)) slot.put(place, bits, i);
    }
    return key >= bracket.mark ? 1u : 0u;
  };
  int done = 0;
  if (t.unit >= kLeastUnit && reinterpret_cast<uintptr_t>(weights) % 16 == 0 &&
      (!kMask || reinterpret_cast<uintptr_t>(mask) % 8 == 0)) {
    constexpr int kStep = kThreads * kReadVectors * kLanes;
    for (; done + kStep <= n; done += kStep)
      read_step<kType, kMask>(weights + done, done, bracket, kMask ? mask + done : nullptr, slot, aside, t, far_above);
  }
#pragma unroll 1
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
  const int64_t columns = columns_of(a.bins);
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
    const int64_t offset = entry.begin_of(c);
    const int n = entry.count_of(c);
    uint32_t* aside = &s.aside[turn];
    for_type(entry.dtype, [&]<DType kType>() {
      const auto* weights = static_cast<const storage_t<kType>*>(entry.data) + offset;
      const Slot<kType> slot(a.aside, c);
      if (bracket.holds) {
        uint8_t* mask = kMask ? static_cast<uint8_t*>(entry.out) + offset : nullptr;
        read_chunk<kType, kMask>(weights, n, bracket, mask, slot, aside, t, s.far);
      } else {
        survey_chunk<kType, 1>(entry, offset, n, t, s);  // rare: registers are for the other
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
        for_each_key<kType, 1>(weights, n, [&](uint32_t key, int) {
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
