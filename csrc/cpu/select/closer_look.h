// A better bracket for a layer all of whose weights are in the cache: a few more passes over them.
#pragma once

#include <cstdint>

#include "cpu/select/bracket.h"

namespace dimap::cpu {

// weights: [n], all of the layer. outliers: empty, and left so. Replaces the bracket of a guess that says so (`look`).
void look_closer(DecideFn decide, const void* weights, int64_t n, ExponentSums& outliers, Guess& guess);

}  // namespace dimap::cpu
