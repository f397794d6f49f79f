// Scores of the weights of a bucket, or of a small layer: a block sorts their magnitudes, sums the squares from the
// largest down and writes the scores. A bucket that a block cannot hold (more weights than the histogram could tell
// apart) is read again and again, a range of magnitudes at a time.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

constexpr int kSorters = kTuning.sorters;  // threads of a block that sorts
constexpr int kSorterWarps = kSorters / 32;
constexpr int kRows = kBucketSize / kSorters;  // keys of a thread
constexpr int kDigits = 256;
constexpr int kWalkBins = 1024;
static_assert(kSorters >= kDigits && kRows * kSorters == kBucketSize && kRows % 2 == 1, "odd: no bank conflicts");

// Where a layer's scores go: a place counts its chunks in full, as a plan does.
struct Scores {
  const Plan* plan;
  int64_t first_chunk;
  float* one;  // of the only tensor, or null

  __device__ Scores(const Plan& of, int32_t layer) : plan(&of), first_chunk(of.modules[layer].first_chunk) {
    const TensorEntry* tensor = of.tensors + tensor_of(of, first_chunk);
    one = tensor[1].first_chunk >= of.modules[layer].last_chunk ? static_cast<float*>(tensor->out) : nullptr;
  }
  __device__ void put(int64_t place, float score) const {
    if (one) {
      one[place] = score;
      return;
    }
    const TensorEntry& tensor = plan->tensors[tensor_of(*plan, first_chunk + place / kChunk)];
    static_cast<float*>(tensor.out)[place - (tensor.first_chunk - first_chunk) * kChunk] = score;
  }
};

// The weights of a bucket: each(f) calls f(key, place, number) for all of them.
struct Moved {
  const uint32_t *keys, *places;
  int64_t count;
  template <typename F>
  __device__ void each(F&& f) const {
    for (int64_t i = threadIdx.x; i < count; i += kSorters) {
      const uint32_t word = keys[i];
      f(word & 0x7FFFFFFFu, static_cast<int64_t>(word >> 31) << 32 | places[i], i);
    }
  }
};

// ... of a layer that fits a block, where they are.
struct InPlace {
  const Plan* plan;
  int32_t layer;
  template <typename F>
  __device__ void each(F&& f) const {
    const ModuleEntry part = plan->modules[layer];
    int32_t tensor = tensor_of(*plan, part.first_chunk);
    int64_t number = 0;
    for (int64_t c = part.first_chunk; c < part.last_chunk; ++c) {
      while (plan->tensors[tensor + 1].first_chunk <= c) ++tensor;
      const TensorEntry& entry = plan->tensors[tensor];
      const int64_t offset = entry.begin_of(c), place = (c - part.first_chunk) * kChunk;
      const int n = entry.count_of(c);
      for_type(entry.dtype, [&]<DType kType>() {
        const auto* weights = static_cast<const storage_t<kType>*>(entry.data) + offset;
        for (int i = static_cast<int>(threadIdx.x); i < n; i += kSorters)
          f(key_of<kType>(weights[i]), place + i, number + i);
      });
      number += n;
    }
  }
};

// Dynamic shared memory of a block that sorts.
struct SortShared {
  uint32_t keys[kBucketSize];  // from the largest magnitude down, once sorted: what they are less than `last`
  union {
    uint32_t counters[kSorterWarps * kDigits];
    float scores[kBucketSize];  // of each key's last place
  };
  Word histogram[kWalkBins];
  Word taken;
  uint32_t filled;
  int32_t end;
};

// Sorts the first rows * kSorters keys, of which the lowest `bits` bits differ, but for those that are all ones.
__device__ inline void sort_keys(SortShared& s, int rows, int bits) {
  const int me = static_cast<int>(threadIdx.x), lane = me % 32, warp = me / 32;
  uint32_t* counters = s.counters + warp * kDigits;
  for (int shift = 0; shift < bits; shift += 8) {
    for (int i = me; i < kSorterWarps * kDigits; i += kSorters) s.counters[i] = 0;
    __syncthreads();
    uint32_t keys[kRows], ranks[(kRows + 1) / 2] = {};  // two ranks in a word: registers are few
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (j < rows) keys[j] = s.keys[(warp * rows + j) * 32 + lane];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (j >= rows) continue;
      const uint32_t digit = keys[j] >> shift & (kDigits - 1);
      const uint32_t alike = __match_any_sync(0xFFFFFFFFu, digit), before = counters[digit];
      ranks[j / 2] |= (before + static_cast<uint32_t>(__popc(alike & ((1u << lane) - 1)))) << (j % 2 * 16);
      __syncwarp();
      if (__ffs(static_cast<int>(alike)) - 1 == lane) counters[digit] = before + static_cast<uint32_t>(__popc(alike));
      __syncwarp();
    }
    __syncthreads();
    int32_t mine = 0, all;
    if (me < kDigits)
      for (int w = 0; w < kSorterWarps; ++w) mine += static_cast<int32_t>(s.counters[w * kDigits + me]);
    auto before = static_cast<uint32_t>(block_scan<kSorterWarps>(mine, all));
    if (me < kDigits)
      for (int w = 0; w < kSorterWarps; ++w) {
        uint32_t& counter = s.counters[w * kDigits + me];
        const uint32_t here = counter;
        counter = before;
        before += here;
      }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (j < rows)
        s.keys[counters[keys[j] >> shift & (kDigits - 1)] + (ranks[j / 2] >> (j % 2 * 16) & 0xFFFFu)] = keys[j];
    __syncthreads();
  }
}

// Scores of the `count` weights with keys in [first, last]; `above`: the energy of those above. Returns theirs.
template <typename Weights>
__device__ double score_range(const Weights& weights, const Scores& scores, uint32_t first, uint32_t last, int count,
                              double above, bool all, SortShared& s) {
  const int me = static_cast<int>(threadIdx.x), rows = (count + kSorters - 1) / kSorters;
  if (threadIdx.x == 0) s.filled = 0;
  __syncthreads();
  weights.each([&](uint32_t key, int64_t, int64_t number) {
    if (all)
      s.keys[number] = last - key;
    else if (key >= first && key <= last)
      s.keys[atomicAdd(&s.filled, 1u)] = last - key;
  });
  for (int i = count + me; i < rows * kSorters; i += kSorters) s.keys[i] = ~0u;
  __syncthreads();
  int bits = 0;
  while (bits < 31 && (last - first) >> bits) ++bits;
  sort_keys(s, rows, bits);

  const int each = rows | 1, from = me * each, to = from + each < count ? from + each : count;
  double mine = 0, energy;
  for (int i = from; i < to; ++i) mine += squared_value(last - s.keys[i]);
  double sum = above + block_scan<kSorterWarps>(mine, energy);
  for (int i = from; i < to; ++i) {
    const uint32_t key = last - s.keys[i];
    sum += squared_value(key);
    if (i + 1 == count || s.keys[i + 1] != s.keys[i]) s.scores[i] = static_cast<float>(score64(key, sum));
  }
  __syncthreads();
  weights.each([&](uint32_t key, int64_t place, int64_t) {
    if (key < first || key > last) return;
    int low = 0, high = count;  // the last of those that equal it
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (s.keys[middle] <= last - key)
        low = middle;
      else
        high = middle;
    }
    scores.put(place, s.scores[low]);
  });
  __syncthreads();
  return energy;
}

// Scores of more weights than the block can hold, all with keys in [first, last].
template <typename Weights>
__device__ void score_in_ranges(const Weights& weights, const Scores& scores, uint32_t first, uint32_t last,
                                double above, SortShared& s) {
  uint32_t low = first, top = last;
  while (true) {
    int shift = 0;
    while ((top - low) >> shift >= kWalkBins) ++shift;
    const int bins = static_cast<int>((top - low) >> shift) + 1;
    for (int b = static_cast<int>(threadIdx.x); b < bins; b += kSorters) s.histogram[b] = 0;
    __syncthreads();
    weights.each([&](uint32_t key, int64_t, int64_t) {
      if (key >= low && key <= top) atomicAdd(&s.histogram[(top - key) >> shift], Word{1});
    });
    __syncthreads();
    bool narrow = false;
    for (int b = 0; b < bins && !narrow;) {
      if (threadIdx.x == 0) {
        s.taken = 0;
        s.end = b;
        while (s.end < bins && s.taken + s.histogram[s.end] <= kBucketSize) s.taken += s.histogram[s.end++];
      }
      __syncthreads();
      const int end = s.end;
      const Word taken = s.taken, here = s.histogram[b];
      __syncthreads();
      const uint32_t high = top - (static_cast<uint32_t>(b) << shift);
      const int64_t lowest = int64_t{top} - (int64_t{end == b ? b + 1 : end} << shift) + 1;
      const uint32_t bottom = lowest > int64_t{low} ? static_cast<uint32_t>(lowest) : low;
      if (end > b) {
        if (taken) above += score_range(weights, scores, bottom, high, static_cast<int>(taken), above, false, s);
        b = end;
      } else if (shift == 0) {  // many that are equal
        above += static_cast<double>(here) * squared_value(high);
        const auto score = static_cast<float>(score64(high, above));
        weights.each([&](uint32_t key, int64_t place, int64_t) {
          if (key == high) scores.put(place, score);
        });
        ++b;
      } else {
        top = high, low = bottom, narrow = true;
      }
    }
    __syncthreads();
    if (narrow) continue;
    if (low == first) return;
    top = low - 1, low = first;
  }
}

__device__ inline SortShared& sort_shared() { return *reinterpret_cast<SortShared*>(dynamic_shared); }

// Buckets that fit a block, or the others: these are rare, and take more registers.
template <bool kFit>
__global__ void __launch_bounds__(kSorters, kFit ? 2 : 1) bucket_kernel(const __grid_constant__ BucketArgs a) {
  if (*a.bad != 0) return;
  SortShared& s = sort_shared();
  const uint32_t count = a.list[0];
  for (uint32_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Bucket& bucket = a.buckets[a.list[1 + i]];
    const auto size = static_cast<int64_t>(bucket.end - bucket.begin);
    if (size == 0 || (size <= kBucketSize) != kFit) continue;
    const Moved weights{a.keys + bucket.begin, a.places + bucket.begin, size};
    const Scores scores(a.plan, bucket.layer);
    if constexpr (kFit)
      score_range(weights, scores, bucket.first, bucket.last, static_cast<int>(size), bucket.above, true, s);
    else
      score_in_ranges(weights, scores, bucket.first, bucket.last, bucket.above, s);
  }
}

// Layers that fit a block, a block for each.
__global__ void __launch_bounds__(kSorters, 2) small_kernel(const __grid_constant__ Plan plan, int32_t* bad) {
  SortShared& s = sort_shared();
  for (int32_t l = static_cast<int32_t>(blockIdx.x); l < plan.layer_count; l += static_cast<int32_t>(gridDim.x)) {
    const int64_t count = plan.layers[l].total;
    if (count == 0) continue;
    const InPlace weights{&plan, l};
    uint32_t largest = 0;
    weights.each([&](uint32_t key, int64_t, int64_t) { largest = key > largest ? key : largest; });
    const bool finite = !__syncthreads_or(largest >= kNonFinite);
    if (finite)
      score_range(weights, Scores(plan, l), 0, kNonFinite - 1, static_cast<int>(count), 0.0, true, s);
    else if (threadIdx.x == 0)
      atomicMax(bad, kBadWeights);
  }
}

// NaN everywhere, where a weight was not finite.
__global__ void __launch_bounds__(kThreads, 2) spoil_kernel(const __grid_constant__ Plan plan, const int32_t* bad) {
  if (*bad == 0) return;
  for (int64_t c = blockIdx.x; c < plan.chunks; c += gridDim.x) {
    const TensorEntry& tensor = plan.tensors[tensor_of(plan, c)];
    const int64_t offset = tensor.begin_of(c);
    const int n = tensor.count_of(c);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads)
      static_cast<float*>(tensor.out)[offset + i] = __int_as_float(0x7FC00000);
  }
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_sorters(Kernel kernel, int64_t work, cudaStream_t stream, const Arguments&... arguments) {
  cudaError_t error = allow_shared(kernel, sizeof(SortShared));
  int64_t most = 1;
  if (error == cudaSuccess) error = resident(kernel, &most, kSorters, sizeof(SortShared));
  if (error != cudaSuccess) return error;
  return launch_with({.threads = kSorters, .shared = sizeof(SortShared)}, kernel, blocks_for(work, most), stream,
                     arguments...);
}

}  // namespace

cudaError_t score_buckets(const BucketArgs& args, cudaStream_t stream) {
  const int64_t buckets = int64_t{args.plan.layer_count} * kMostBuckets;
  const cudaError_t error = launch_sorters(bucket_kernel<true>, buckets, stream, args);
  return error == cudaSuccess ? launch_sorters(bucket_kernel<false>, buckets, stream, args) : error;
}

cudaError_t score_small(const Plan& plan, int32_t* bad, cudaStream_t stream) {
  return launch_sorters(small_kernel, plan.layer_count, stream, plan, bad);
}

cudaError_t spoil(const Plan& plan, const int32_t* bad, cudaStream_t stream) {
  return launch(spoil_kernel, blocks_for(plan.chunks, kMostBlocks), stream, plan, bad);
}

}  // namespace dimap::cuda
