// A guess at each layer's cut from a small sample: it costs a few percent of a read and is never trusted.
#pragma once

#include <vector>

#include "../problem.h"
#include "decide.h"
#include "parallel.h"

namespace dimap::cpu {

struct Guess {
  std::vector<Bracket> brackets;  // [layers]: expected to hold the cut
  std::vector<double> aside;      // [layers]: expected number of weights inside the bracket
};

// Positions are pseudo-random but fixed: the same weights give the same sample on every machine and run.
Guess guess_brackets(const Problem& problem, const Pool& pool);

}  // namespace dimap::cpu
