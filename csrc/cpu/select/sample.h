// A sketch of each layer from a small sample: it costs a few percent of a read and is never trusted.
#pragma once

#include <span>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/select/bracket.h"
#include "cpu/select/histogram.h"
#include "cpu/select/loader.h"

namespace dimap::cpu {

// Of all layers; guesses: which of them will be looked at closely; exchange: where other ranks hold weights of them
// too. Positions are pseudo-random but fixed: the same weights give the same sample on every machine and run.
std::vector<Sketch> sample_layers(const Problem& problem, std::span<const Guess> guesses, Loader& loader,
                                  const Pool& pool, const Exchange* exchange);

}  // namespace dimap::cpu
