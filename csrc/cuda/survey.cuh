// One read of the weights through their layers' windows, into tables: the survey of core/table.h on a grid.
#pragma once

#include "cuda/block.cuh"

namespace dimap::cuda {

// Squares of weights far above a window, for each exponent an integer of 96 bits: more of them than there can be fit.
struct Far {
  static constexpr int exponents = 254;
  uint32_t low[exponents], middle[exponents], high[exponents];
};

template <int kBins = kTuning.most_bins>
struct SurveyShared {
  static constexpr int bins = kBins;
  uint32_t count[kBins];
  uint32_t low[kBins], high[kBins];  // of the sum of squares, 64 bits
  uint32_t inside;                   // weights in the bins since they were last flushed
  uint32_t aside[3];                 // of a chunk: see read.cu
  Far far;
};

struct SurveyArgs {
  Plan plan;
  const LayerState* layers;
  const ModuleState* modules;  // null: read every layer
  Word* table;                 // [layers, kHead + 3 * bins], zeroed
  int32_t bins;                // of a row
  int32_t first_bin;           // of the row, where the window's first one goes
  bool above;                  // sum what lies above the window, and count what was read
  int32_t* bad;                // raised to kBadWeights
};

// A thread's sums over the layer at hand: weights above the window as integers q = significand << (scale - unit), q <
// 2^32.
struct Above {
  uint32_t base, shift, end, limit;  // of the window; first key that q does not hold,
  uint32_t beyond;                   // those below `beyond` are summed by their exponents
  int unit;
  Word low, high;  // sum of q²
  uint32_t count, inside, largest;

  __device__ void look_through(const View& view) {
    base = view.base;
    shift = view.shift;
    end = view.end() < kNonFinite ? view.end() : kNonFinite;
    unit = scale(end < kNonFinite ? end : kNonFinite - 1);
    const uint32_t exponent = static_cast<uint32_t>(unit) + 1 + 9;
    limit = exponent < 255 ? exponent << 23 : kNonFinite;
    beyond = kNonFinite;
    low = high = 0;
    count = inside = 0;
  }
  __device__ void sum_nothing() { limit = beyond = 0; }
};

__device__ inline void add_words(Word* words, Word value, int bit) {
  split_words(value, bit, [&](int word, Word term) { atomicAdd(words + word, term); });
}

// Adds the square of a key far above the window to its exponent's.
__device__ __forceinline__ void see_far(uint32_t key, Far& far) {
  const int e = scale(key);
  const uint64_t energy = square(key);
  const auto low = static_cast<uint32_t>(energy);
  const uint32_t old_low = atomicAdd(&far.low[e], low);
  const uint32_t middle = static_cast<uint32_t>(energy >> 32) + (old_low + low < old_low ? 1u : 0u);
  const uint32_t old_middle = atomicAdd(&far.middle[e], middle);
  if (old_middle + middle < old_middle) atomicAdd(&far.high[e], 1u);
}

// Sums a key above the window; far(key): one far above it.
template <typename F>
__device__ __forceinline__ void see_above(uint32_t key, Above& t, F&& far) {
  if (key < t.limit) {
    const uint32_t q = significand(key) << (scale(key) - t.unit);
    const Word q2 = static_cast<Word>(q) * q;
    t.low += q2;
    t.high += t.low < q2;
    ++t.count;
  } else if (key < t.beyond) {
    far(key);
    ++t.count;
  }
}

// Adds a key inside the window to the block's bins.
template <typename Shared>
__device__ __forceinline__ void see_inside(uint32_t key, const Above& t, Shared& s) {
  // A key that was set aside may be read again: whatever others have written there since stays in the bins.
  const uint32_t place = (key - t.base) >> t.shift, last = Shared::bins - 1, bin = place < last ? place : last;
  const uint64_t energy = square(key);
  const auto low = static_cast<uint32_t>(energy);
  atomicAdd(&s.count[bin], 1u);
  const uint32_t old = atomicAdd(&s.low[bin], low);
  atomicAdd(&s.high[bin], static_cast<uint32_t>(energy >> 32) + (old + low < old ? 1u : 0u));
}

template <typename Shared>
__device__ __forceinline__ void see(uint32_t key, Above& t, Shared& s) {
  t.largest = key > t.largest ? key : t.largest;
  if (key >= t.end) {
    see_above(key, t, [&](uint32_t large) { see_far(large, s.far); });
  } else if (key >= t.base) {
    see_inside(key, t, s);
    ++t.inside;
  }
}

template <typename Shared>
__device__ inline void clear_bins(Shared& s) {
  for (int b = static_cast<int>(threadIdx.x); b < Shared::bins; b += kThreads) s.count[b] = s.low[b] = s.high[b] = 0;
  for (int e = static_cast<int>(threadIdx.x); e < Far::exponents; e += kThreads)
    s.far.low[e] = s.far.middle[e] = s.far.high[e] = 0;
  if (threadIdx.x == 0) s.inside = s.aside[0] = s.aside[1] = s.aside[2] = 0;
  __syncthreads();
}

// The bins of the block go to the table, from bin `first` of the row on, and what it summed far above the window. All
// threads, with the same arguments.
template <typename Shared>
__device__ inline void flush_bins(Shared& s, Word* row, int bins, int first = 0) {
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < bins; b += kThreads) {
    const uint32_t count = s.count[b];
    if (count == 0) continue;
    const Word sum = static_cast<Word>(s.high[b]) << 32 | s.low[b];
    Word* bin = row + kHead + 3 * (first + b);
    atomicAdd(bin, static_cast<Word>(count));
    atomicAdd(bin + 1, sum & 0xFFFFFFu);
    atomicAdd(bin + 2, sum >> 24);
    s.count[b] = s.low[b] = s.high[b] = 0;
  }
  for (int e = static_cast<int>(threadIdx.x); e < Far::exponents; e += kThreads) {
    Far& far = s.far;
    if ((far.low[e] | far.middle[e] | far.high[e]) == 0) continue;
    add_words(row + 2, static_cast<Word>(far.middle[e]) << 32 | far.low[e], 2 * e);
    add_words(row + 2, far.high[e], 2 * e + 64);
    far.low[e] = far.middle[e] = far.high[e] = 0;
  }
  if (threadIdx.x == 0) s.inside = 0;
  __syncthreads();
}

// What each thread summed above the window goes to the table. Whole warps.
__device__ inline void flush_above(const Above& t, Word* row) {
  const Word parts[4] = {warp_sum(t.count), warp_sum(t.low & 0xFFFFFFFFu), warp_sum(t.low >> 32), warp_sum(t.high)};
  if (threadIdx.x % 32 == 0 && parts[0]) {
    atomicAdd(row + 1, parts[0]);
#pragma unroll
    for (int p = 0; p < 3; ++p)
      if (parts[1 + p]) add_words(row + 2, parts[1 + p], 2 * t.unit + 32 * p);
  }
}

__device__ inline uint32_t mix(uint32_t x) {  // a finaliser of 32 bits: where in its stratum a run is sampled
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

template <DType kType, int kUnroll, typename Shared>
__device__ __forceinline__ void survey_chunk(const TensorEntry& tensor, int64_t offset, int n, Above& t, Shared& s) {
  const void* data = static_cast<const storage_t<kType>*>(tensor.data) + offset;
  for_each_key<kType, kUnroll>(data, n, [&](uint32_t key, int) { see(key, t, s); });
}

// ... of one run of 32 neighbours in `ratio`, of n weights from a multiple of 32 * ratio on. A warp takes a run, with
// kLoads of them in flight.
template <DType kType, typename Shared>
__device__ __forceinline__ void sample_piece(const TensorEntry& tensor, int64_t offset, int64_t n, uint32_t ratio,
                                             uint32_t seed, Above& t, Shared& s) {
  constexpr int kLoads = 4;
  const auto* weights = static_cast<const storage_t<kType>*>(tensor.data);
  const int64_t first = offset / 32 / ratio, runs = (n + 32 * int64_t{ratio} - 1) / (32 * int64_t{ratio});
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t start = threadIdx.x / 32; start < runs; start += kWarps * kLoads) {
    storage_t<kType> bits[kLoads];
    bool there[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t run = first + start + k * kWarps;
      const int64_t at = (run * ratio + (mix(seed + static_cast<uint32_t>(run)) & (ratio - 1))) * 32 + lane;
      there[k] = start + k * kWarps < runs && at < offset + n;
      if (there[k]) bits[k] = weights[at];
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (there[k]) see(key_of<kType>(bits[k]), t, s);
  }
}

// Which layers a survey reads.
enum class Reads { kSample, kAll, kEscaped };

// All blocks of the grid: each reads the chunks of one range, in order.
template <Reads kReads, typename Shared>
__device__ __forceinline__ void survey(const SurveyArgs& a, Shared& s) {
  const int64_t first = a.plan.chunks * blockIdx.x / gridDim.x, last = a.plan.chunks * (blockIdx.x + 1) / gridDim.x;
  clear_bins(s);
  if (first >= last) return;
  const int64_t columns = columns_of(a.bins);
  Above t;
  t.largest = 0;
  int32_t tensor = tensor_of(a.plan, first), layer = -1;
  int64_t read = 0;
  int bins = 0;
  uint32_t ratio = 1;
  Word* row = nullptr;
  auto flush = [&] {
    if (layer < 0) return;
    flush_bins(s, row, bins, a.first_bin);
    if (!a.above) return;
    flush_above(t, row);
    if (threadIdx.x == 0) atomicAdd(row, static_cast<Word>(read));
  };
  uint32_t sampled = 0;  // weights of a sample that may lie in the bins, at most
  for (int64_t c = first, next; c < last; c = next) {
    while (a.plan.tensors[tensor + 1].first_chunk <= c) ++tensor;
    const TensorEntry entry = a.plan.tensors[tensor];
    next = c + 1;
    if (a.modules && a.modules[a.plan.layers[entry.layer].module].decided) continue;
    if (kReads == Reads::kEscaped && a.layers[entry.layer].bracket.holds) continue;
    if (entry.layer != layer) {
      flush();
      layer = entry.layer;
      row = a.table + layer * columns;
      bins = static_cast<int>(a.layers[layer].view.bins);
      ratio = a.layers[layer].ratio;
      read = 0;
      sampled = 0;
      t.look_through(a.layers[layer].view);
      if (!a.above) t.sum_nothing();
    }
    const int64_t offset = entry.begin_of(c);
    if constexpr (kReads == Reads::kSample) {  // as many chunks of the tensor at a time as surely fit the bins
      const int64_t end = entry.first_chunk + (entry.numel + kChunk - 1) / kChunk, most = c + 2 * int64_t{ratio};
      next = end < last ? end : last;
      next = next < most ? next : most;
      const int64_t to =
          (next - entry.first_chunk) * kChunk < entry.numel ? (next - entry.first_chunk) * kChunk : entry.numel;
      const auto here = static_cast<uint32_t>((to - offset) / ratio) + 32;
      if (sampled + here > 65535u) {
        flush_bins(s, row, bins, a.first_bin);
        sampled = 0;
      }
      sampled += here;
      for_type(entry.dtype, [&]<DType kType>() {
        sample_piece<kType>(entry, offset, to - offset, ratio, mix(static_cast<uint32_t>(tensor)), t, s);
      });
      read += to - offset;
      continue;
    }
    const int n = entry.count_of(c);
    for_type(entry.dtype, [&]<DType kType>() { survey_chunk<kType, kOccupancy.unroll>(entry, offset, n, t, s); });
    read += n;
    // The shared sums hold 2^16 - 1 weights.
    const uint32_t inside = __reduce_add_sync(0xFFFFFFFFu, t.inside);
    t.inside = 0;
    if (threadIdx.x % 32 == 0 && inside) atomicAdd(&s.inside, inside);
    __syncthreads();
    const bool full = s.inside > 65535u - kChunk;
    __syncthreads();
    if (full) flush_bins(s, row, bins, a.first_bin);
  }
  flush();
  if (t.largest >= kNonFinite) atomicMax(a.bad, kBadWeights);
}

}  // namespace dimap::cuda
