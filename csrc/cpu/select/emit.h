// From cuts to masks, or to zeros in place.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.h"
#include "core/solve.h"
#include "cpu/parallel.h"
#include "cpu/select/chunks.h"

namespace dimap::cpu {

class Reading;

// cuts: [layers]. quota: [modules], how many of the tied weights are kept; counted down. masks: [tensors].
// `reading`, `read`: what a reading has written already and which layers ([layers], nonzero) may rely on it, or null.
void emit(const Problem& problem, std::span<const Cut> cuts, std::span<int64_t> quota, std::span<uint8_t* const> masks,
          Reading* reading, std::span<const uint8_t> read, const Pool& pool);

// The same decision, zeroing in place.
void zero(const Problem& problem, std::span<const Cut> cuts, std::span<int64_t> quota, Reading* reading,
          std::span<const uint8_t> read, const Pool& pool);

}  // namespace dimap::cpu
