// From tables to cuts: each module's threshold, and through it each layer's magnitude cut, exactly.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/table.h"

namespace dimap {

// A layer keeps its weights with key >= keep_from. Those with key == tie score exactly the module's threshold: they
// share the module's quota in order of position (tie == kNoTie: there are none).
struct Cut {
  static constexpr uint32_t kNoTie = 0xFFFFFFFFu;
  uint32_t keep_from = kKeyEnd;
  uint32_t tie = kNoTie;
};

struct ModuleCut {
  bool decided = false;
  double threshold = 0.0;  // the smallest score64 kept; NaN where nothing is kept
  int64_t quota = 0;       // how many of the tied weights are kept
};

// Where to look next in a layer of an undecided module.
struct Next {
  Window window;
  bool escaped = false;  // the cut may lie outside the window that the table was taken through
  bool settled = false;  // nowhere: the layer keeps `kept` weights, those with key >= window.below_end
  int64_t kept = 0;
};

// Solves one module.
//
//   tables  the module's layers, each surveyed through its own window
//   keep    how many weights the module keeps, in [0, sum of the totals]
//   cuts    one for each layer, valid where the module is decided
//   next    one for each layer, valid where it is not; windows of as many bins as the layer's table has. The module may
//           be solved without its settled layers, and what they keep.
//
// A bin bounds the scores inside it; the keep-th largest of the lower bounds and that of the upper bounds enclose the
// threshold. Only bins between the two matter: once each of them holds a single magnitude the exact scores decide, else
// the windows close in on them. Windows may be guesses: what lies outside one is a bin with bounds like any other.
ModuleCut solve(std::span<const LayerTable> tables, int64_t keep, std::span<Cut> cuts, std::span<Next> next);

}  // namespace dimap
