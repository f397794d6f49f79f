// Scores from weights of any type: a histogram of their magnitudes, a partition into buckets of neighbouring ones, then
// a block for a bucket (sorted.cu).
//
// What lies above a bucket comes from the histogram's integers, and a block sums sorted magnitudes in a fixed order, so
// scores are the same in every run, however the partition has shuffled a bucket.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/survey.cuh"

namespace dimap::cuda {
namespace {

constexpr int kIntervals = kBucketBins + 2;           // above the window, its bins, below
constexpr int kTile = kChunk < 4096 ? kChunk : 4096;  // weights that are partitioned at a time
static_assert(kChunk % kTile == 0 && kTile % kThreads == 0);

// Where the histogram's window lies: around the median exponent of a sample, 128 bins for each power of two.
__global__ void __launch_bounds__(kThreads, 1) center_kernel(const __grid_constant__ BucketArgs a) {
  constexpr int kSamples = 8;  // of a thread
  __shared__ uint32_t count[256];
  for (int32_t l = static_cast<int32_t>(blockIdx.x); l < a.plan.layer_count; l += static_cast<int32_t>(gridDim.x)) {
    for (int e = static_cast<int>(threadIdx.x); e < 256; e += kThreads) count[e] = 0;
    __syncthreads();
    const ModuleEntry part = a.plan.modules[l];
    for (int s = 0; s < kSamples; ++s) {
      const uint32_t number = static_cast<uint32_t>(s) * kThreads + threadIdx.x;
      const int64_t c = part.first_chunk + (part.last_chunk - part.first_chunk) * number / (kSamples * kThreads);
      const TensorEntry tensor = a.plan.tensors[tensor_of(a.plan, c)];
      const int64_t offset = tensor.begin_of(c);
      const int n = tensor.count_of(c);
      const int64_t at = offset + mix(number) % static_cast<uint32_t>(n);
      uint32_t key = 0;
      for_type(tensor.dtype,
               [&]<DType kType>() { key = key_of<kType>(static_cast<const storage_t<kType>*>(tensor.data)[at]); });
      if (key != 0 && key < kNonFinite) atomicAdd(&count[key >> 23], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t all = 0, below = 0;
#pragma unroll 4
      for (int e = 0; e < 255; ++e) all += count[e];
      int median = 0;
      while (median < 254 && 2 * (below + count[median]) < all) below += count[median++];
      const int lowest = median < 9 ? 0 : median - 9 > 239 ? 239 : median - 9;
      a.layers[l].view = {static_cast<uint32_t>(lowest) << 23, 16, kBucketBins, kKeyEnd, 0};
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 2) histogram_kernel(const __grid_constant__ SurveyArgs a) {
  __shared__ SurveyShared<kBucketBins> shared;
  survey<Reads::kAll>(a, shared);
}

__device__ inline solver::Layer intervals_of(const BucketArgs& a, int32_t l) {
  solver::Layer layer{};
  layer.row = a.table + l * columns_of(kBucketBins);
  layer.view = a.layers[l].view;
  layer.granularity = a.plan.layers[l].granularity;
  layer.ratio = 1;
  return layer;
}

// Joins intervals to buckets that a block can hold, in order from the largest magnitudes: a block for a layer.
__global__ void __launch_bounds__(kThreads, 1) group_kernel(const __grid_constant__ BucketArgs a) {
  constexpr int kEach = (kIntervals + kThreads - 1) / kThreads;
  if (*a.bad != 0) return;
  for (int32_t l = static_cast<int32_t>(blockIdx.x); l < a.plan.layer_count; l += static_cast<int32_t>(gridDim.x)) {
    const solver::Layer layer = intervals_of(a, l);
    const int64_t total = a.plan.layers[l].total;
    const int64_t share = total / (kMostBuckets - 1) + 1;
    const int64_t size = share > kBucketSize / 2 ? share : kBucketSize / 2;
    const int from = static_cast<int>(threadIdx.x) * kEach, to = from + kEach < kIntervals ? from + kEach : kIntervals;
    int64_t mine = 0;
    double energy = 0;
    for (int i = from; i < to && i < kIntervals - 1; ++i) mine += layer.count(i), energy += layer.energy(i);
    int64_t all;
    double sum;
    int64_t before = block_scan<kWarps>(mine, all);
    double above = block_scan<kWarps>(energy, sum);
    int64_t group = before / size;
    int64_t previous = from > 0 && from < to ? (before - layer.count(from - 1)) / size : -1;
    for (int i = from; i < to; ++i) {
      const int64_t count = i == kIntervals - 1 ? total - all : layer.count(i);
      const int64_t next = i == kIntervals - 1 ? kMostBuckets : (before + count) / size;
      Bucket& bucket = a.buckets[int64_t{l} * kMostBuckets + group];
      a.bucket_of[int64_t{l} * kIntervals + i] = static_cast<uint16_t>(group);
      if (group != previous) {
        bucket.begin = bucket.end = static_cast<Word>(a.starts[l] + before);
        bucket.above = above;
        bucket.last = layer.last(i);
        bucket.layer = l;
      }
      if (group != next) {
        bucket.first = layer.first(i);
        a.list[1 + atomicAdd(a.list, 1u)] = static_cast<uint32_t>(int64_t{l} * kMostBuckets + group);
      }
      if (i < kIntervals - 1) above += layer.energy(i);
      before += count;
      previous = group;
      group = next;
    }
  }
}

__device__ inline int interval_of(uint32_t key, const View& view) {
  if (key >= view.end()) return 0;
  if (key < view.base) return kIntervals - 1;
  return kBucketBins - static_cast<int>((key - view.base) >> view.shift);
}

struct PartitionShared {
  uint16_t bucket_of[kIntervals];
  uint32_t count[kMostBuckets];  // of the tile, then where its part of the tile starts
  int64_t shift[kMostBuckets];   // from a place in the tile to one in the buffer
  uint32_t keys[kTile];
  uint16_t offsets[kTile], buckets[kTile];
};
static_assert(sizeof(PartitionShared) <= 48 << 10);

// Moves keys and places to their buckets, a tile at a time. Zeros score 0 at once.
__global__ void __launch_bounds__(kThreads, 2) partition_kernel(const __grid_constant__ BucketArgs a) {
  constexpr int kEach = kTile / kThreads, kSums = (kMostBuckets + kThreads - 1) / kThreads;
  if (*a.bad != 0) return;
  __shared__ PartitionShared s;
  const int64_t first = a.plan.chunks * blockIdx.x / gridDim.x, last = a.plan.chunks * (blockIdx.x + 1) / gridDim.x;
  const int me = static_cast<int>(threadIdx.x);
  int32_t tensor = first < last ? tensor_of(a.plan, first) : 0, layer = -1;
  View view{};
  for (int64_t c = first; c < last; ++c) {
    while (a.plan.tensors[tensor + 1].first_chunk <= c) ++tensor;
    const TensorEntry entry = a.plan.tensors[tensor];
    if (entry.layer != layer) {
      layer = entry.layer;
      view = a.layers[layer].view;
      __syncthreads();
      for (int i = me; i < kIntervals; i += kThreads) s.bucket_of[i] = a.bucket_of[int64_t{layer} * kIntervals + i];
    }
    const int64_t offset = entry.begin_of(c);
    const int64_t place = (c - a.plan.modules[layer].first_chunk) * kChunk;
    const int n = entry.count_of(c);
    for (int start = 0; start < n; start += kTile) {
      for (int b = me; b < kMostBuckets; b += kThreads) s.count[b] = 0;
      __syncthreads();
      uint32_t keys[kEach], ranks[kEach];  // rank in the bucket's part of the tile, and the bucket
      for_type(entry.dtype, [&]<DType kType>() {
        const auto* weights = static_cast<const storage_t<kType>*>(entry.data) + offset;
        auto* scores = static_cast<float*>(entry.out) + offset;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const int i = start + j * kThreads + me;
          keys[j] = i < n ? key_of<kType>(weights[i]) : kNonFinite;
          if (keys[j] == 0) scores[i] = 0.0f;
        }
      });
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (keys[j] == 0 || keys[j] >= kNonFinite) continue;
        const uint32_t bucket = s.bucket_of[interval_of(keys[j], view)];
        ranks[j] = bucket << 16 | atomicAdd(&s.count[bucket], 1u);
      }
      __syncthreads();
      int32_t counts[kSums], mine = 0, tile;
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const int b = me * kSums + k;
        counts[k] = b < kMostBuckets ? static_cast<int32_t>(s.count[b]) : 0;
        mine += counts[k];
      }
      int32_t at = block_scan<kWarps>(mine, tile);
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const int b = me * kSums + k;
        if (b >= kMostBuckets) continue;
        s.count[b] = static_cast<uint32_t>(at);
        if (counts[k]) {
          Bucket& bucket = a.buckets[int64_t{layer} * kMostBuckets + b];
          s.shift[b] = static_cast<int64_t>(atomicAdd(&bucket.end, static_cast<Word>(counts[k]))) - at;
        }
        at += counts[k];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (keys[j] == 0 || keys[j] >= kNonFinite) continue;
        const uint32_t slot = s.count[ranks[j] >> 16] + (ranks[j] & 0xFFFFu);
        s.keys[slot] = keys[j];
        s.offsets[slot] = static_cast<uint16_t>(start + j * kThreads + me);
        s.buckets[slot] = static_cast<uint16_t>(ranks[j] >> 16);
      }
      __syncthreads();
      for (int i = me; i < tile; i += kThreads) {
        const int64_t to = s.shift[s.buckets[i]] + i, from = place + s.offsets[i];
        a.keys[to] = s.keys[i] | static_cast<uint32_t>(from >> 32) << 31;
        a.places[to] = static_cast<uint32_t>(from);
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t score_by_buckets(const BucketArgs& args, cudaStream_t stream) {
  const Plan& plan = args.plan;
  const auto words = static_cast<size_t>(plan.layer_count * columns_of(kBucketBins));
  int64_t most = 1;
  cudaError_t error = cudaMemsetAsync(args.table, 0, words * sizeof(Word), stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(args.list, 0, sizeof(uint32_t), stream);
  if (error == cudaSuccess) error = launch(center_kernel, blocks_for(plan.layer_count, kMostBlocks), stream, args);
  if (error == cudaSuccess) error = resident(histogram_kernel, &most);
  if (error == cudaSuccess)
    error = launch(histogram_kernel, blocks_for(plan.chunks, most), stream,
                   SurveyArgs{plan, args.layers, nullptr, args.table, kBucketBins, 0, true, args.bad});
  if (error == cudaSuccess) error = launch(group_kernel, blocks_for(plan.layer_count, kMostBlocks), stream, args);
  if (error == cudaSuccess) error = resident(partition_kernel, &most);
  if (error == cudaSuccess) error = launch(partition_kernel, blocks_for(plan.chunks, most), stream, args);
  if (error == cudaSuccess) error = score_buckets(args, stream);
  return error;
}

}  // namespace dimap::cuda
