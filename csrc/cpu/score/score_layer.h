// One layer's scores, three ways; score.cpp chooses.
#pragma once

#include <span>

#include "core/problem.h"
#include "cpu/parallel.h"
#include "cpu/score/parted.h"
#include "cpu/select/chunks.h"

namespace dimap::cpu {

// Thrown for an infinity or a NaN; score() says where it is.
struct FoundNonFinite {};

// What one worker needs beside the weights.
struct ScoreMemory {
  Parted parted;
  LargeBuffer rows;    // Rows
  LargeBuffer tables;  // of one bucket, or all of a small layer
};

// Weights of one 16-bit type: they have 32,768 magnitudes, so a histogram and a table of scores do.
void score_by_table(DType dtype, std::span<const Piece> pieces, const Pool& pool);

// Small layers: a radix sort in the cache.
void score_by_sort(std::span<const Piece> pieces, int64_t total, ScoreMemory& memory);

// Large layers: part the weights by the high bits of their keys, score each bucket in the cache, and hand the scores
// back in the order in which the weights came. memory: of each worker of the pool. shared: whether workers share the
// layer; to be decided by its size alone, since roundings differ.
void score_by_buckets(std::span<const Piece> pieces, bool shared, const Pool& pool, std::span<ScoreMemory> memory);

}  // namespace dimap::cpu
