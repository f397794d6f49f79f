// Every weight's score: the one operator that must know every rank.
#pragma once

#include <span>

#include "core/problem.h"
#include "cpu/parallel.h"

namespace dimap::cpu {

// scores: [tensors], each of numel floats. Within 1 ulp of score64 rounded to float32, and the same whatever the number
// of workers. Only the layers of the problem are used. Throws NonFinite.
void score(const Problem& problem, std::span<float* const> scores, const Pool& pool);

}  // namespace dimap::cpu
