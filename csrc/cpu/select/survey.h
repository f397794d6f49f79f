// One read of the weights through windows: the tables that solve works on.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.h"
#include "core/table.h"
#include "cpu/parallel.h"
#include "cpu/select/loader.h"

namespace dimap::cpu {

struct Survey {
  std::vector<LayerTable> tables;  // [layers]
  std::vector<Bin> bins;           // what the tables point into: [wanted layers, bins]
};

// Of this rank's weights. windows: [layers], each of `bins` bins. wanted: [layers], nonzero where the layer is to be
// read; empty: all are. Throws NonFinite.
Survey survey(const Problem& problem, std::span<const Window> windows, int64_t bins, std::span<const uint8_t> wanted,
              Loader& loader, const Pool& pool);

// Throws NonFinite for the first infinity or NaN of this rank's weights, if there is one.
void check_finite(const Problem& problem, Loader& loader);

}  // namespace dimap::cpu
