// The CPU engine: guess the cuts, read once, solve on what the read set aside, emit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.h"
#include "core/solve.h"
#include "cpu/parallel.h"

namespace dimap::cpu {

// Masks ([tensors], numel bytes each) of what each module keeps. Returns the modules' thresholds. Throws NonFinite.
std::vector<ModuleCut> select(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool);

// Zeroes what select would drop: the tensors' data is written, once all is decided. Throws NonFinite before.
std::vector<ModuleCut> prune(const Problem& problem, const Pool& pool);

}  // namespace dimap::cpu
