// Bitmask files back into dense ones.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.h"
#include "cpu/parallel.h"
#include "cpu/sparse/pack.h"

namespace dimap::cpu {

// A tensor stored as one bit a weight and its nonzero values; what is in files is given by the byte where it begins.
struct Packed {
  int32_t file;           // of the values, and in the same order of the target
  int64_t values, count;  // where the values are, and how many
  int32_t bits_file;      // where the bits are,
  int64_t bits;           // which may be another file
  int64_t numel, size;    // weights, and bytes of one: 1, 2, 4 or 8
  int64_t place;          // in the target
};

// Bytes that are the same in the target.
struct Copied {
  int32_t file;
  int64_t offset, bytes, place;
};

// targets: [files], in their full length. Throws FileError, BadBits.
void expand(const std::vector<File>& files, const std::vector<File>& targets, std::span<const Packed> tensors,
            std::span<const Copied> copied, const Pool& pool);

}  // namespace dimap::cpu
