#include "cpu/sparse/pack.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/sizes.h"

namespace dimap::cpu {
namespace {

// Calls body(T{}, chunk, first weight, weights) for every chunk, T being an integer of a weight's size.
template <typename Body>
void for_chunks(const Packing& packing, const Pool& pool, Body&& body) {
  pool.for_each((packing.n + Packing::kChunk - 1) / Packing::kChunk, [&](int64_t c, int) {
    const int64_t first = c * Packing::kChunk, n = std::min(Packing::kChunk, packing.n - first);
    if (packing.size == 4)
      body(uint32_t{}, static_cast<size_t>(c), first, n);
    else
      body(uint16_t{}, static_cast<size_t>(c), first, n);
  });
}

std::vector<int64_t> no_offsets(const Packing& packing) {
  return std::vector<int64_t>(static_cast<size_t>((packing.n + Packing::kChunk - 1) / Packing::kChunk) + 1);
}

// From how many values each chunk has, one place later, to where they begin.
void add_up(std::vector<int64_t>& counts) {
  for (size_t i = 1; i < counts.size(); ++i) counts[i] += counts[i - 1];
}

template <typename T>
int64_t count_nonzero(const T* weights, int64_t n) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += weights[i] != 0;
  return count;
}

// The same way back; what is read is inside `end`, the end of all values.
template <typename T>
void unpack_chunk(const uint8_t* bits, const T* values, const T* end, T* weights, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n && end - values >= 8; i += 8) {
    const uint32_t byte = bits[i / 8];
    for (int j = 0; j < 8; ++j) {
      const uint32_t bit = byte >> j & 1;
      weights[i + j] = static_cast<T>(*values & (T{0} - static_cast<T>(bit)));
      values += bit;
    }
  }
  for (; i < n; ++i) weights[i] = bits[i / 8] >> i % 8 & 1 ? *values++ : T{0};
}

}  // namespace

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    count += std::popcount(word);
  }
  for (; i < bytes; ++i) count += std::popcount(bits[i]);
  return count;
}

// No branch depends on a weight: each is stored, and the next one is stored over it if it was zero. So a step writes up
// to 8 places from `values` on; near `end`, behind which another chunk's values lie, weights go one by one.
template <typename T>
T* pack_chunk(const T* weights, int64_t n, uint8_t* bits, T* values, const T* end) {
  int64_t i = 0;
  for (; i + 8 <= n && end - values >= 8; i += 8) {
    uint32_t byte = 0;
    for (int j = 0; j < 8; ++j) {
      const T weight = weights[i + j];
      const uint32_t bit = weight != 0;
      *values = weight;
      values += bit;
      byte |= bit << j;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
  for (; i < n; i += 8) {
    uint32_t byte = 0;
    for (int j = 0; j < 8 && i + j < n; ++j) {
      if (weights[i + j] == 0) continue;
      *values++ = weights[i + j];
      byte |= 1u << j;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
  return values;
}

template uint8_t* pack_chunk(const uint8_t*, int64_t, uint8_t*, uint8_t*, const uint8_t*);
template uint16_t* pack_chunk(const uint16_t*, int64_t, uint8_t*, uint16_t*, const uint16_t*);
template uint32_t* pack_chunk(const uint32_t*, int64_t, uint8_t*, uint32_t*, const uint32_t*);
template uint64_t* pack_chunk(const uint64_t*, int64_t, uint8_t*, uint64_t*, const uint64_t*);

void unpack_chunk(const uint8_t* bits, const void* values, int64_t count, void* weights, int64_t n, int64_t size) {
  for_size(size, [&]<typename T>(T) {
    const T* in = static_cast<const T*>(values);
    unpack_chunk(bits, in, in + count, static_cast<T*>(weights), n);
  });
}

void pack_bits(const uint8_t* mask, int64_t n, uint8_t* bits) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {  // eight bytes of 0 or 1 to eight bits by one product
    uint64_t word;
    std::memcpy(&word, mask + i, 8);
    bits[i / 8] = static_cast<uint8_t>((word & 0x0101010101010101u) * 0x0102040810204080u >> 56);
  }
  if (i == n) return;
  uint8_t last = 0;
  for (int64_t j = i; j < n; ++j) last = static_cast<uint8_t>(last | (mask[j] != 0) << (j - i));
  bits[i / 8] = last;
}

std::vector<int64_t> offsets_of_weights(const void* weights, const Packing& packing, const Pool& pool) {
  std::vector<int64_t> offsets = no_offsets(packing);
  for_chunks(packing, pool, [&]<typename T>(T, size_t c, int64_t first, int64_t n) {
    offsets[c + 1] = count_nonzero(static_cast<const T*>(weights) + first, n);
  });
  add_up(offsets);
  return offsets;
}

std::vector<int64_t> offsets_of_bits(const uint8_t* bits, const Packing& packing, const Pool& pool) {
  std::vector<int64_t> offsets = no_offsets(packing);
  for_chunks(packing, pool, [&]<typename T>(T, size_t c, int64_t first, int64_t n) {
    offsets[c + 1] = count_bits(bits + first / 8, n / 8 + (n % 8 != 0));
  });
  add_up(offsets);
  return offsets;
}

void pack(const void* weights, const Packing& packing, const std::vector<int64_t>& offsets, uint8_t* bits, void* values,
          const Pool& pool) {
  for_chunks(packing, pool, [&]<typename T>(T, size_t c, int64_t first, int64_t n) {
    T* out = static_cast<T*>(values);
    pack_chunk(static_cast<const T*>(weights) + first, n, bits + first / 8, out + offsets[c], out + offsets[c + 1]);
  });
}

void unpack(const uint8_t* bits, const void* values, const Packing& packing, const std::vector<int64_t>& offsets,
            void* weights, const Pool& pool) {
  for_chunks(packing, pool, [&]<typename T>(T, size_t c, int64_t first, int64_t n) {
    const T* in = static_cast<const T*>(values);
    unpack_chunk(bits + first / 8, in + offsets[c], in + offsets.back(), static_cast<T*>(weights) + first, n);
  });
}

}  // namespace dimap::cpu
