// N:M, and rows: of every m weights along one dimension the n of largest magnitude are kept, of equal ones the first.
#pragma once

#include <cstdint>
#include <span>

#include "core/magnitude.h"
#include "cpu/parallel.h"

namespace dimap::cpu {

// A tensor cut along the dimension: [blocks, m, inner], inner being the weights behind that dimension.
struct Grouped {
  void* weights;  // contiguous
  uint8_t* mask;  // of the same shape, out; null where weights are zeroed in place
  int64_t blocks, inner;
  DType dtype;
};

// Marks groups of any m, or throws NonFinite for weights whose place in their tensor begins at `offset`.
void mark_largest(const Grouped& piece, int64_t n, int64_t m, int64_t tensor, int64_t offset);

// Writes the masks. Throws NonFinite for the first infinity or NaN.
void select_nm(std::span<const Grouped> tensors, int n, int m, const Pool& pool);

// Zeroes in place what the masks would drop; before the first weight changes all were seen to be finite.
void zero_nm(std::span<const Grouped> tensors, int n, int m, const Pool& pool);

}  // namespace dimap::cpu
