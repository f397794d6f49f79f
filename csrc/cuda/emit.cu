// Masks, or zeroes in place, from decided cuts.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

struct Piece {
  TensorEntry tensor;
  int64_t offset;
  int n;
  uint32_t keep_from, tie;
};

__device__ inline Piece piece_of(const Plan& plan, const LayerState* layers, int64_t c) {
  Piece p;
  p.tensor = plan.tensors[tensor_of(plan, c)];
  p.offset = p.tensor.begin_of(c);
  p.n = p.tensor.count_of(c);
  p.keep_from = layers ? layers[p.tensor.layer].keep_from : 0;
  p.tie = layers ? layers[p.tensor.layer].tie : kNoTie;
  return p;
}

// The bytes of four weights at a time.
template <DType kType>
__device__ uint32_t write_mask(const Piece& p) {
  using T = storage_t<kType>;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  const T* weights = static_cast<const T*>(p.tensor.data) + p.offset;
  auto* mask = static_cast<uint8_t*>(p.tensor.out) + p.offset;
  uint32_t ties = 0;
  int done = 0;
  if (reinterpret_cast<uintptr_t>(weights) % 16 == 0 && reinterpret_cast<uintptr_t>(mask) % 8 == 0) {
    const uint4* vectors = reinterpret_cast<const uint4*>(weights);
    const int count = p.n / kLanes;
    for (int start = static_cast<int>(threadIdx.x); start < count; start += kThreads * kOccupancy.emit_unroll) {
      uint4 v[kOccupancy.emit_unroll];
#pragma unroll
      for (int u = 0; u < kOccupancy.emit_unroll; ++u)
        if (start + u * kThreads < count) v[u] = vectors[start + u * kThreads];
#pragma unroll
      for (int u = 0; u < kOccupancy.emit_unroll; ++u) {
        const int at = start + u * kThreads;
        if (at >= count) continue;
        const uint32_t words[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
        uint32_t bytes[kLanes / 4] = {};
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          uint32_t key;
          if constexpr (sizeof(T) == 4)
            key = key_of<kType>(words[k]);
          else
            key = key_of<kType>(static_cast<T>(words[k / 2] >> (k % 2 * 16)));
          bytes[k / 4] |= (key >= p.keep_from ? 1u : 0u) << (k % 4 * 8);
          ties += key == p.tie;
        }
        if constexpr (kLanes == 4)
          reinterpret_cast<uint32_t*>(mask)[at] = bytes[0];
        else
          reinterpret_cast<uint2*>(mask)[at] = make_uint2(bytes[0], bytes[kLanes / 4 - 1]);
      }
    }
    done = count * kLanes;
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < p.n; i += kThreads) {
    const uint32_t key = key_of<kType>(weights[i]);
    mask[i] = key >= p.keep_from;
    ties += key == p.tie;
  }
  return ties;
}

template <DType kType>
__device__ uint32_t zero_dropped(const Piece& p) {
  using T = storage_t<kType>;
  T* weights = const_cast<T*>(static_cast<const T*>(p.tensor.data)) + p.offset;
  uint32_t ties = 0;
  for_each_key<kType, kOccupancy.emit_unroll>(weights, p.n, [&](uint32_t key, int i) {
    if (key < p.keep_from && key != p.tie) weights[i] = 0;
    ties += key == p.tie;
  });
  return ties;
}

// Puts right what the deciding read guessed of the weights it set aside: a warp for a chunk. Counts the ties.
__global__ void __launch_bounds__(kThreads, kOccupancy.blocks) fix_kernel(const __grid_constant__ EmitArgs a) {
  if (*a.bad != 0) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t c = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; c < a.plan.chunks;
       c += int64_t{gridDim.x} * kWarps) {
    const int32_t count = a.aside.count[c];
    if (count < 0) continue;
    const Piece p = piece_of(a.plan, a.layers, c);
    const Bracket bracket = a.layers[p.tensor.layer].bracket;
    if (!bracket.holds) continue;
    auto* mask = static_cast<uint8_t*>(p.tensor.out) + p.offset;
    uint32_t ties = 0;
    for_type(p.tensor.dtype, [&]<DType kType>() {
      const Slot<kType> slot(a.aside, c);
      for (int i = lane; i < count; i += 32) {
        const uint32_t key = slot.key(i);
        const bool keep = key >= p.keep_from;
        if (keep != (key >= bracket.mark)) mask[slot.position(i)] = keep;
        ties += key == p.tie;
      }
    });
    ties = __reduce_add_sync(0xFFFFFFFFu, ties);
    if (lane == 0) a.ties[c] = static_cast<int32_t>(ties), a.kept[c] = 0, a.aside.count[c] = kPutRight - count;
  }
}

// The chunks that are not right yet, read whole.
template <bool kZero>
__global__ void __launch_bounds__(kThreads, kOccupancy.blocks) emit_kernel(const __grid_constant__ EmitArgs a) {
  const bool bad = *a.bad != 0;
  for (int64_t c = blockIdx.x; c < a.plan.chunks; c += gridDim.x) {
    if (!kZero && !bad && a.aside.count && a.aside.count[c] <= kPutRight) continue;
    Piece p = piece_of(a.plan, a.layers, c);
    uint32_t ties = 0;
    if (bad) p.keep_from = kZero ? 0 : 0xFFFFFFFFu, p.tie = kNoTie;
    if (!kZero || !bad)
      for_type(p.tensor.dtype, [&]<DType kType>() { ties = kZero ? zero_dropped<kType>(p) : write_mask<kType>(p); });
    if (threadIdx.x == 0) a.kept[c] = 0;
    if (p.tie == kNoTie) {  // the same for all threads
      if (threadIdx.x == 0) a.ties[c] = 0;
      continue;
    }
    __shared__ uint32_t sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    ties = __reduce_add_sync(0xFFFFFFFFu, ties);
    if (threadIdx.x % 32 == 0 && ties) atomicAdd(&sum, ties);
    __syncthreads();
    if (threadIdx.x == 0) a.ties[c] = static_cast<int32_t>(sum);
    __syncthreads();
  }
}

// Shares each module's quota among its chunks, in order: a block for a module. No chunk keeps ties before.
__global__ void __launch_bounds__(kThreads) share_kernel(const __grid_constant__ EmitArgs a) {
  constexpr int kEach = 8;  // consecutive chunks of a thread
  if (*a.bad != 0) return;
  for (int32_t m = static_cast<int32_t>(blockIdx.x); m < a.plan.module_count; m += static_cast<int32_t>(gridDim.x)) {
    const ModuleEntry module = a.plan.modules[m];
    int64_t left = a.quota[m];
    for (int64_t start = module.first_chunk; left > 0 && start < module.last_chunk; start += kThreads * kEach) {
      const int64_t from = start + int64_t{threadIdx.x} * kEach;
      const int64_t to = from + kEach < module.last_chunk ? from + kEach : module.last_chunk;
      int32_t ties[kEach] = {};
      int64_t mine = 0;
      if (from < to) {
        int32_t tensor = tensor_of(a.plan, from);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if (from + i >= to) continue;
          while (a.plan.tensors[tensor + 1].first_chunk <= from + i) ++tensor;
          if (a.plan.layers[a.plan.tensors[tensor].layer].module == m) ties[i] = a.ties[from + i];
          mine += ties[i];
        }
      }
      int64_t total;
      int64_t here = left - block_scan<kWarps>(mine, total);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (ties[i] == 0) continue;
        a.kept[from + i] = static_cast<int32_t>(here <= 0 ? 0 : here < ties[i] ? here : ties[i]);
        here -= ties[i];
      }
      left = left > total ? left - total : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) a.quota[m] = left;
  }
}

// Keeps all ties of a chunk (of a mask), or drops them all (of weights): the first pass has left them as they are not.
template <DType kType, bool kZero>
__device__ void settle_all(const EmitArgs& a, const Piece& p, int64_t c) {
  using T = storage_t<kType>;
  T* weights = const_cast<T*>(static_cast<const T*>(p.tensor.data)) + p.offset;
  uint8_t* mask = kZero ? nullptr : static_cast<uint8_t*>(p.tensor.out) + p.offset;
  if (!kZero && a.aside.count && a.aside.count[c] <= kPutRight) {
    const Slot<kType> slot(a.aside, c);
    for (int i = static_cast<int>(threadIdx.x); i < kPutRight - a.aside.count[c]; i += kThreads)
      if (slot.key(i) == p.tie) mask[slot.position(i)] = 1;
    return;
  }
  for_each_key<kType, kOccupancy.emit_unroll>(weights, p.n, [&](uint32_t key, int i) {
    if (key != p.tie) return;
    if constexpr (kZero)
      weights[i] = 0;
    else
      mask[i] = 1;
  });
}

// Keeps the first `quota` ties of a chunk and drops the others. Each thread has a run of neighbours.
template <DType kType, bool kZero>
__device__ void settle_in_order(const Piece& p, int64_t quota) {
  using T = storage_t<kType>;
  T* weights = const_cast<T*>(static_cast<const T*>(p.tensor.data)) + p.offset;
  uint8_t* mask = kZero ? nullptr : static_cast<uint8_t*>(p.tensor.out) + p.offset;
  const int each = (p.n + kThreads - 1) / kThreads, from = static_cast<int>(threadIdx.x) * each;
  const int to = from + each < p.n ? from + each : p.n;
  int64_t mine = 0, total;
  for (int i = from; i < to; ++i) mine += key_of<kType>(weights[i]) == p.tie;
  int64_t place = block_scan<kWarps>(mine, total);
  for (int i = from; mine > 0 && i < to; ++i) {
    if (key_of<kType>(weights[i]) != p.tie) continue;
    if constexpr (kZero) {
      if (place >= quota) weights[i] = 0;
    } else {
      if (place < quota) mask[i] = 1;
    }
    ++place;
  }
}

template <bool kZero>
__global__ void __launch_bounds__(kThreads, kOccupancy.blocks) settle_kernel(const __grid_constant__ EmitArgs a) {
  if (*a.bad != 0) return;
  for (int64_t c = blockIdx.x; c < a.plan.chunks; c += gridDim.x) {
    const int32_t ties = a.ties[c], kept = a.kept[c];
    if (kept == (kZero ? ties : 0)) continue;  // no ties, too
    const Piece p = piece_of(a.plan, a.layers, c);
    for_type(p.tensor.dtype, [&]<DType kType>() {
      if (kept == (kZero ? 0 : ties))
        settle_all<kType, kZero>(a, p, c);
      else
        settle_in_order<kType, kZero>(p, kept);
    });
  }
}

// A word whose bytes are all ones where the mask's four bytes are not 0.
__device__ __forceinline__ uint32_t spread_bytes(uint32_t mask) {
  mask |= mask >> 4, mask |= mask >> 2, mask |= mask >> 1;
  return (mask & 0x01010101u) * 255u;
}

template <typename T>
__device__ void apply_chunk(const Piece& p) {
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  T* weights = const_cast<T*>(static_cast<const T*>(p.tensor.data)) + p.offset;
  const auto* mask = static_cast<const uint8_t*>(p.tensor.out) + p.offset;
  int done = 0;
  if (reinterpret_cast<uintptr_t>(weights) % 16 == 0 && reinterpret_cast<uintptr_t>(mask) % kLanes == 0) {
    auto* vectors = reinterpret_cast<uint4*>(weights);
    const int count = p.n / kLanes;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      uint4 v = vectors[i];
      if constexpr (kLanes == 4) {
        const uint32_t kept = spread_bytes(reinterpret_cast<const uint32_t*>(mask)[i]);
        v.x &= static_cast<uint32_t>(static_cast<int8_t>(kept)),
            v.y &= static_cast<uint32_t>(static_cast<int8_t>(kept >> 8));
        v.z &= static_cast<uint32_t>(static_cast<int8_t>(kept >> 16)),
            v.w &= static_cast<uint32_t>(static_cast<int8_t>(kept >> 24));
      } else {
        const uint2 bytes = reinterpret_cast<const uint2*>(mask)[i];
        const uint32_t low = spread_bytes(bytes.x), high = spread_bytes(bytes.y);
        v.x &= (low & 0xFFu) * 0x101u | (low >> 8 & 0xFFu) * 0x1010000u;
        v.y &= (low >> 16 & 0xFFu) * 0x101u | (low >> 24) * 0x1010000u;
        v.z &= (high & 0xFFu) * 0x101u | (high >> 8 & 0xFFu) * 0x1010000u;
        v.w &= (high >> 16 & 0xFFu) * 0x101u | (high >> 24) * 0x1010000u;
      }
      vectors[i] = v;
    }
    done = count * kLanes;
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < p.n; i += kThreads)
    if (mask[i] == 0) weights[i] = 0;
}

__global__ void __launch_bounds__(kThreads, kOccupancy.blocks) apply_kernel(const __grid_constant__ Plan plan) {
  for (int64_t c = blockIdx.x; c < plan.chunks; c += gridDim.x) {
    const Piece p = piece_of(plan, nullptr, c);
    if (static_cast<DType>(p.tensor.dtype) == DType::kFloat32)
      apply_chunk<uint32_t>(p);
    else
      apply_chunk<uint16_t>(p);
  }
}

template <bool kZero>
cudaError_t emit_as(const EmitArgs& a, cudaStream_t stream) {
  const unsigned blocks = blocks_for(a.plan.chunks, kMostBlocks);
  cudaError_t error = cudaSuccess;
  if (!kZero && a.aside.count) error = launch(fix_kernel, blocks_for(a.plan.chunks / kWarps, kMostBlocks), stream, a);
  if (error == cudaSuccess) error = launch(emit_kernel<kZero>, blocks, stream, a);
  if (error == cudaSuccess) error = launch(share_kernel, blocks_for(a.plan.module_count, kMostBlocks), stream, a);
  if (error == cudaSuccess) error = launch(settle_kernel<kZero>, blocks, stream, a);
  return error;
}

}  // namespace

cudaError_t emit(const EmitArgs& args, bool zero, cudaStream_t stream) {
  return zero ? emit_as<true>(args, stream) : emit_as<false>(args, stream);
}

cudaError_t apply(const Plan& plan, cudaStream_t stream) {
  return launch(apply_kernel, blocks_for(plan.chunks, kMostBlocks), stream, plan);
}

}  // namespace dimap::cuda
