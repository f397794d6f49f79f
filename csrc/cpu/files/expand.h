// Bitmask files back into dense ones.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "core/problem.h"
#include "cpu/parallel.h"

namespace dimap::cpu {

// A tensor stored as one bit a weight and its nonzero values; what is in files is given by the byte where it begins.
struct Packed {
  int32_t file;
  int64_t values, count;  // where the values are, and how many
  int64_t bits;           // where the bits are
  int64_t numel, size;    // weights, and bytes of one: 2 or 4
  int64_t place;          // in the target
};

// Bytes that are the same in the target.
struct Copied {
  int32_t file;
  int64_t offset, bytes, place;
};

// Bits that do not fit the values, by their number or since the file changed.
struct BadBits : std::runtime_error {
  BadBits(int64_t tensor, int64_t required, int64_t got)
      : std::runtime_error("bits do not fit values"), tensor(tensor), required(required), got(got) {}
  int64_t tensor, required, got;  // values
};

// targets: [files], in their full length. Throws FileError, BadBits.
void expand(const std::vector<File>& files, const std::vector<File>& targets, std::span<const Packed> tensors,
            std::span<const Copied> copied, const Pool& pool);

}  // namespace dimap::cpu
