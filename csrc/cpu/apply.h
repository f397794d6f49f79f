// Zeroing by a mask.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/parallel.h"

namespace dimap::cpu {

struct Applied {
  void* weights;
  const uint8_t* mask;  // [n] bytes, 0 where not
  int64_t n;
  int64_t size;  // bytes of a weight: 2 or 4
};

// Weights whose mask is 0 become +0; the others keep their bits.
void apply_piece(const Applied& piece);
void apply(std::span<const Applied> work, const Pool& pool);

}  // namespace dimap::cpu
