// N:M: of every m weights along a dimension the n of largest magnitude, of equal ones the first. A thread has a group,
// or as many as fill 16 bytes of weights.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dimap::cuda {
namespace {

struct Part {
  GroupEntry tensor;
  int64_t first;  // its groups [first, first + count)
  int count;
};

__device__ inline Part part_of(const GroupArgs& a, int64_t piece) {
  Part p;
  p.tensor = a.tensors[holder_of(a.tensors, a.tensor_count, &GroupEntry::first_piece, piece)];
  p.first = (piece - p.tensor.first_piece) * kGroupsInPiece;
  const int64_t left = p.tensor.groups - p.first;
  p.count = left < kGroupsInPiece ? static_cast<int>(left) : kGroupsInPiece;
  return p;
}

template <DType kType>
__device__ __forceinline__ uint32_t magnitude(storage_t<kType> bits) {  // orders as keys do
  return sizeof(bits) == 4 ? bits & 0x7FFFFFFFu : bits & 0x7FFFu;
}

// One bit for each weight of a group that is kept.
template <int kM>
__device__ __forceinline__ uint32_t kept_of(const uint32_t* keys, int n) {
  int rank[kM] = {};
#pragma unroll
  for (int i = 1; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < i; ++j) {
      const bool first = keys[j] >= keys[i];
      rank[i] += first ? 1 : 0;
      rank[j] += first ? 0 : 1;
    }
  }
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < kM; ++i) kept |= (rank[i] < n ? 1u : 0u) << i;
  return kept;
}

// A group whose weights are `inner` apart. Returns the largest magnitude.
template <DType kType, int kM, bool kZero>
__device__ uint32_t one_group(const GroupArgs& a, const GroupEntry& t, int64_t group) {
  using T = storage_t<kType>;
  const int m = kM ? kM : a.m;
  const int64_t at = group / t.inner * m * t.inner + group % t.inner;
  T* weights = const_cast<T*>(static_cast<const T*>(t.data)) + at;
  uint32_t kept = 0, largest = 0;
  if constexpr (kM != 0) {
    uint32_t keys[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      keys[i] = magnitude<kType>(weights[i * t.inner]);
      largest = keys[i] > largest ? keys[i] : largest;
    }
    kept = kept_of<kM>(keys, a.n);
  } else {  // read again and again, from the cache
    for (int i = 0; i < m; ++i) {
      const uint32_t own = magnitude<kType>(weights[i * t.inner]);
      largest = own > largest ? own : largest;
      int rank = 0;
      for (int j = 0; j < m; ++j) {
        const uint32_t other = magnitude<kType>(weights[j * t.inner]);
        rank += other > own || (other == own && j < i) ? 1 : 0;
      }
      kept |= (rank < a.n ? 1u : 0u) << i;
    }
  }
  for (int i = 0; i < m; ++i) {
    if constexpr (kZero) {
      if ((kept >> i & 1) == 0) weights[i * t.inner] = 0;
    } else {
      static_cast<uint8_t*>(t.out)[at + i * t.inner] = static_cast<uint8_t>(kept >> i & 1);
    }
  }
  return largest;
}

// Neighbouring groups, of at least 16 bytes of weights together, as vectors. Returns how many weights it has seen to.
template <DType kType, int kM, bool kZero>
__device__ int adjacent_groups(const GroupArgs& a, const Part& p, uint32_t& largest) {
  using T = storage_t<kType>;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  constexpr int kWeights = kM > kLanes ? kM : kLanes, kVectors = kWeights / kLanes;
  const int64_t first = p.first * kM;
  T* weights = const_cast<T*>(static_cast<const T*>(p.tensor.data)) + first;
  auto* mask = kZero ? nullptr : static_cast<uint8_t*>(p.tensor.out) + first;
  if (reinterpret_cast<uintptr_t>(weights) % 16 != 0 || reinterpret_cast<uintptr_t>(mask) % 4 != 0) return 0;
  const int units = p.count * kM / kWeights;
  for (int u = static_cast<int>(threadIdx.x); u < units; u += kThreads) {
    auto* vectors = reinterpret_cast<uint4*>(weights) + u * kVectors;
    uint4 v[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) v[k] = vectors[k];
    uint32_t keys[kWeights];
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      const uint4& here = v[k / kLanes];
      const uint32_t words[4] = {here.x, here.y, here.z, here.w};
      constexpr int kEach = 4 / static_cast<int>(sizeof(T));
      const int lane = k % kLanes;
      keys[k] = magnitude<kType>(static_cast<T>(words[lane / kEach] >> (lane % kEach * 16)));
      largest = keys[k] > largest ? keys[k] : largest;
    }
    uint32_t kept = 0;
#pragma unroll
    for (int g = 0; g < kWeights; g += kM) kept |= kept_of<kM>(keys + g, a.n) << g;
    if constexpr (kZero) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const uint32_t bits = kept >> (k * kLanes);
        uint32_t words[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          if constexpr (kLanes == 4)
            words[w] = bits >> w & 1 ? words[w] : 0;
          else
            words[w] &= (bits >> (2 * w) & 1) * 0xFFFFu | (bits >> (2 * w + 1) & 1) * 0xFFFF0000u;
        }
        vectors[k] = uint4{words[0], words[1], words[2], words[3]};
      }
    } else {
      auto* words = reinterpret_cast<uint32_t*>(mask) + u * (kWeights / 4);
#pragma unroll
      for (int w = 0; w < kWeights / 4; ++w) {
        const uint32_t bits = kept >> (4 * w) & 0xFu;
        words[w] = (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21;
      }
    }
  }
  return units * kWeights;
}

template <DType kType, int kM, bool kZero>
__device__ void mark(const GroupArgs& a, const Part& p) {
  constexpr uint32_t kInfinity = infinity_bits(kType);
  uint32_t largest = 0;
  int done = 0;
  if constexpr (kM != 0)
    if (p.tensor.inner == 1) done = adjacent_groups<kType, kM, kZero>(a, p, largest) / kM;
  for (int g = done + static_cast<int>(threadIdx.x); g < p.count; g += kThreads) {
    const uint32_t key = one_group<kType, kM, kZero>(a, p.tensor, p.first + g);
    largest = key > largest ? key : largest;
  }
  if (!kZero && largest >= kInfinity) *a.bad = kBadWeights;  // whoever writes writes the same
}

// Sixteen keys and their ranks at a time take more registers.
template <int kM, bool kZero>
__global__ void __launch_bounds__(kThreads, kM == 16 ? kOccupancy.read_blocks : kOccupancy.blocks)
    mark_kernel(const __grid_constant__ GroupArgs a) {
  if (kZero && *a.bad != 0) return;
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) {
    const Part p = part_of(a, piece);
    for_type(p.tensor.dtype, [&]<DType kType>() { mark<kType, kM, kZero>(a, p); });
  }
}

__global__ void clear_kernel(int32_t* bad) { *bad = 0; }

// Raises *bad where a weight is not finite.
__global__ void __launch_bounds__(kThreads, kOccupancy.blocks) finite_kernel(const __grid_constant__ GroupArgs a) {
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) {
    const Part p = part_of(a, piece);
    // The weights of a piece in their memory's order: which group each is of does not matter here.
    const int n = p.count * a.m;
    for_type(p.tensor.dtype, [&]<DType kType>() {
      uint32_t largest = 0;
      const auto* weights = static_cast<const storage_t<kType>*>(p.tensor.data) + p.first * a.m;
      for_each_key<kType, kOccupancy.unroll>(weights, n,
                                             [&](uint32_t key, int) { largest = key > largest ? key : largest; });
      if (largest >= kNonFinite) *a.bad = kBadWeights;
    });
  }
}

// Masks that keep nothing, where *bad is nonzero.
__global__ void __launch_bounds__(kThreads, kOccupancy.blocks) drop_kernel(const __grid_constant__ GroupArgs a) {
  if (*a.bad == 0) return;
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) {
    const Part p = part_of(a, piece);
    auto* mask = static_cast<uint8_t*>(p.tensor.out) + p.first * a.m;
    for (int i = static_cast<int>(threadIdx.x); i < p.count * a.m; i += kThreads) mask[i] = 0;
  }
}

template <bool kZero>
cudaError_t launch_mark(const GroupArgs& a, cudaStream_t stream) {
  const unsigned blocks = blocks_for(a.pieces, kMostBlocks);
  switch (a.m) {
    case 2:
      return launch(mark_kernel<2, kZero>, blocks, stream, a);
    case 4:
      return launch(mark_kernel<4, kZero>, blocks, stream, a);
    case 8:
      return launch(mark_kernel<8, kZero>, blocks, stream, a);
    case 16:
      return launch(mark_kernel<16, kZero>, blocks, stream, a);
    default:
      return launch(mark_kernel<0, kZero>, blocks, stream, a);
  }
}

}  // namespace

cudaError_t nm(const GroupArgs& a, bool zero, cudaStream_t stream) {
  const unsigned blocks = blocks_for(a.pieces, kMostBlocks);
  cudaError_t error = launch_with({.threads = 1}, clear_kernel, 1, stream, a.bad);
  if (zero && error == cudaSuccess) error = launch(finite_kernel, blocks, stream, a);
  if (error == cudaSuccess) error = zero ? launch_mark<true>(a, stream) : launch_mark<false>(a, stream);
  if (!zero && error == cudaSuccess) error = launch(drop_kernel, blocks, stream, a);
  return error;
}

}  // namespace dimap::cuda
