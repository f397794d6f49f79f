// The CPU engine: survey -> solve -> emit over a set of tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "../problem.h"
#include "../solve.h"
#include "parallel.h"

namespace dimap::cpu {

struct Cuts {
  std::vector<Cut> layers;
  std::vector<ModuleCut> modules;
};

// One read of the weights through `windows` ([layers], each of `bins` bins). Only the layers of modules in `wanted`
// ([modules], nonzero: yes; empty: all) are read. Throws NonFinite.
struct Survey {
  std::vector<LayerTable> tables;  // [layers]
  std::vector<Bin> bins;           // what the tables point into: [layers, bins]
};
Survey survey(const Problem& problem, std::span<const Window> windows, int64_t bins,
              std::span<const uint8_t> wanted, const Pool& pool);

// The masks of weights for known cuts. masks: [tensors], each of numel bytes. `quota`: [modules], how many of the tied
// weights may still be kept; counted down.
void emit(const Problem& problem, std::span<const Cut> cuts, std::span<int64_t> quota,
          std::span<uint8_t* const> masks, const Pool& pool);

// Survey and solve from scratch; nothing is written. Throws NonFinite.
Cuts cut(const Problem& problem, const Pool& pool);

// Masks and cuts: one read of the weights where the guess of the cuts holds.
Cuts select(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool);

// Zeroes what select would drop. The tensors' data is written; it is not touched before all is decided.
Cuts prune(const Problem& problem, const Pool& pool);

}  // namespace dimap::cpu
