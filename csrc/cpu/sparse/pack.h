// Sparse weights as one bit each and the nonzero values, and back: exact, as bits are all that is looked at.
//
// Bit i % 8 of byte i / 8, from the least significant, is 1 where weight i has any bit set (a negative zero has); the
// values are those weights, in order. Unused bits of the last byte are 0.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/parallel.h"

namespace dimap::cpu {

// Bits that do not fit the values, by their number or since the file changed.
struct BadBits : std::runtime_error {
  BadBits(int64_t tensor, int64_t required, int64_t got)
      : std::runtime_error("bits do not fit values"), tensor(tensor), required(required), got(got) {}
  int64_t tensor, required, got;  // values
};

// What is packed: n weights of `size` bytes each, 2 or 4.
struct Packing {
  static constexpr int64_t kChunk = int64_t{1} << 16;  // weights; a multiple of 8
  int64_t n;
  int64_t size;
  int64_t bytes() const { return n / 8 + (n % 8 != 0); }
};

// Which value each chunk begins with, [chunks + 1]: the last is the number of values. From weights, or from bits.
std::vector<int64_t> offsets_of_weights(const void* weights, const Packing& packing, const Pool& pool);
std::vector<int64_t> offsets_of_bits(const uint8_t* bits, const Packing& packing, const Pool& pool);

int64_t count_bits(const uint8_t* bits, int64_t bytes);

// n weights of T, an integer of their size. `values` has room up to `end`, where their number of values ends: nothing
// is written behind it. Returns where the values end.
template <typename T>
T* pack_chunk(const T* weights, int64_t n, uint8_t* bits, T* values, const T* end);

// Back from `count` values of `size` bytes, 1, 2, 4 or 8.
void unpack_chunk(const uint8_t* bits, const void* values, int64_t count, void* weights, int64_t n, int64_t size);

// One bit for each of n bytes of 0 or 1.
void pack_bits(const uint8_t* mask, int64_t n, uint8_t* bits);

// offsets: of these weights. bits: [bytes()]; values: [offsets.back()].
void pack(const void* weights, const Packing& packing, const std::vector<int64_t>& offsets, uint8_t* bits, void* values,
          const Pool& pool);

// offsets: of these bits. values: [offsets.back()]; weights: [n], written in full.
void unpack(const uint8_t* bits, const void* values, const Packing& packing, const std::vector<int64_t>& offsets,
            void* weights, const Pool& pool);

}  // namespace dimap::cpu
