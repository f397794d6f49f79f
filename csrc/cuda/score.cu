// Scores: 16-bit types by an exact histogram and a table, float32 from sorted keys. Sums have a fixed order.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

constexpr int kMagnitudes = 1 << 15;
constexpr int kHistogramBytes = kMagnitudes * 4;

extern __shared__ uint32_t mine[];  // of histogram_kernel, [kMagnitudes]

// kShared: counts go to the block's own histogram first, where the device has room for it.
template <DType kType, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) histogram_kernel(const __grid_constant__ TableArgs a) {
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
    const int64_t offset = (c - entry.first_chunk) * kChunk;
    const int n = static_cast<int>(entry.numel - offset < kChunk ? entry.numel - offset : kChunk);
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
  for (int64_t c = blockIdx.x; c < a.plan.chunks; c += gridDim.x) {
    const TensorEntry entry = a.plan.tensors[tensor_of(a.plan, c)];
    const int64_t offset = (c - entry.first_chunk) * kChunk;
    const int n = static_cast<int>(entry.numel - offset < kChunk ? entry.numel - offset : kChunk);
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
    error = cudaFuncSetAttribute(histogram_kernel<kType, true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kHistogramBytes);
    if (error == cudaSuccess)
      error = launch_with(false, kHistogramBytes, histogram_kernel<kType, true>, blocks_for(a.plan.chunks, processors),
                          stream, a);
  } else {
    error = launch(histogram_kernel<kType, false>, blocks_for(a.plan.chunks, 4 * processors), stream, a);
  }
  if (error == cudaSuccess) error = launch(table_kernel<kType>, blocks_for(a.plan.layer_count, 1 << 14), stream, a);
  if (error == cudaSuccess) error = launch(look_up_kernel, blocks_for(a.plan.chunks, 1 << 14), stream, a);
  return error;
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) keys_kernel(const void* data, int64_t n, int32_t* keys) {
  const auto* weights = static_cast<const storage_t<kType>*>(data);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += int64_t{gridDim.x} * kThreads)
    keys[i] = static_cast<int32_t>(key_of<kType>(weights[i]));
}

// Running sums inside tiles of kTile keys: each thread sums its own kEach, then the block scans the threads' sums.
__global__ void __launch_bounds__(kThreads) tile_kernel(const __grid_constant__ SortedArgs a) {
  constexpr int kEach = kTile / kThreads;
  __shared__ double threads[kThreads];
  for (int64_t tile = blockIdx.x; tile * kTile < a.n; tile += gridDim.x) {
    const int64_t from = tile * kTile + static_cast<int64_t>(threadIdx.x) * kEach;
    double own[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t key = from + i < a.n ? static_cast<uint32_t>(a.keys[from + i]) : 0;
      if (key < kNonFinite)
        sum += squared_value(key);
      else
        atomicMax(a.bad, kBadWeights);
      own[i] = sum;
    }
    threads[threadIdx.x] = sum;
    __syncthreads();
    for (int offset = 1; offset < kThreads; offset *= 2) {
      const double other = static_cast<int>(threadIdx.x) >= offset ? threads[threadIdx.x - offset] : 0.0;
      __syncthreads();
      threads[threadIdx.x] += other;
      __syncthreads();
    }
    const double before = threadIdx.x ? threads[threadIdx.x - 1] : 0.0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (from + i < a.n) a.sums[from + i] = before + own[i];
    if (threadIdx.x == kThreads - 1) a.tiles[tile] = threads[kThreads - 1];
    __syncthreads();
  }
}

// Sums of the tiles before each tile: one block, in order.
__global__ void __launch_bounds__(kThreads) tiles_kernel(double* tiles, int64_t count) {
  __shared__ double threads[kThreads];
  __shared__ double carry;
  if (threadIdx.x == 0) carry = 0;
  for (int64_t start = 0; start < count; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const double mine = i < count ? tiles[i] : 0.0;
    threads[threadIdx.x] = mine;
    __syncthreads();
    for (int offset = 1; offset < kThreads; offset *= 2) {
      const double other = static_cast<int>(threadIdx.x) >= offset ? threads[threadIdx.x - offset] : 0.0;
      __syncthreads();
      threads[threadIdx.x] += other;
      __syncthreads();
    }
    const double before = carry + (threadIdx.x ? threads[threadIdx.x - 1] : 0.0);
    if (i < count) tiles[i] = before;
    __syncthreads();
    if (threadIdx.x == 0) carry += threads[kThreads - 1];
    __syncthreads();
  }
}

// S of a weight is the running sum at the end of the weights that equal it.
__global__ void __launch_bounds__(kThreads) sorted_kernel(const __grid_constant__ SortedArgs a) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.n; i += int64_t{gridDim.x} * kThreads) {
    const int32_t key = a.keys[i];
    int64_t last = i;
    if (key != 0 && i + 1 < a.n && a.keys[i + 1] == key) {
      int64_t step = 1;
      while (i + step < a.n && a.keys[i + step] == key) last = i + step, step *= 2;
      int64_t end = i + step < a.n ? i + step : a.n;  // equal at last, not at end
      while (end - last > 1) {
        const int64_t middle = last + (end - last) / 2;
        if (a.keys[middle] == key)
          last = middle;
        else
          end = middle;
      }
    }
    const double energy = a.tiles[last / kTile] + a.sums[last];
    const auto k = static_cast<uint32_t>(key);
    a.scores[a.positions[i]] = k < kNonFinite ? static_cast<float>(score64(k, energy)) : 0.0f;
  }
}

__global__ void spoil_kernel(float* scores, int64_t n, const int32_t* bad) {
  if (*bad == 0) return;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x)
    scores[i] = __int_as_float(0x7FC00000);
}

}  // namespace

cudaError_t score_by_table(const TableArgs& args, cudaStream_t stream) {
  return args.dtype == DType::kBFloat16 ? by_table<DType::kBFloat16>(args, stream)
                                        : by_table<DType::kFloat16>(args, stream);
}

cudaError_t write_keys(const void* data, DType dtype, int64_t n, int32_t* keys, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const unsigned blocks = blocks_for(n / (4 * kThreads), 1 << 14);
  if (dtype == DType::kFloat32) return launch(keys_kernel<DType::kFloat32>, blocks, stream, data, n, keys);
  if (dtype == DType::kBFloat16) return launch(keys_kernel<DType::kBFloat16>, blocks, stream, data, n, keys);
  return launch(keys_kernel<DType::kFloat16>, blocks, stream, data, n, keys);
}

cudaError_t scores_of_sorted(const SortedArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  cudaError_t error = launch(tile_kernel, blocks_for(tiles_of(args.n), 1 << 14), stream, args);
  if (error == cudaSuccess) error = launch(tiles_kernel, 1, stream, args.tiles, tiles_of(args.n));
  if (error == cudaSuccess) error = launch(sorted_kernel, blocks_for(args.n / kThreads, 1 << 14), stream, args);
  return error;
}

cudaError_t spoil(float* scores, int64_t n, const int32_t* bad, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(spoil_kernel, blocks_for(n / 1024, 1024), stream, scores, n, bad);
}

}  // namespace dimap::cuda
