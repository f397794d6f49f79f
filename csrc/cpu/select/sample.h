// A sketch of each layer from a small sample: it costs a few percent of a read and is never trusted.
#pragma once

#include <vector>

#include "cpu/parallel.h"
#include "cpu/select/sketch.h"

namespace dimap::cpu {

// Of all layers. Positions are pseudo-random but fixed: the same weights give the same sample on every machine and run.
std::vector<Sketch> sample_layers(const Problem& problem, const Pool& pool);

}  // namespace dimap::cpu
