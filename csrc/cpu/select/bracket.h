// From sketches to brackets: where each layer's cut is expected.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/isa/decide.h"
#include "cpu/select/sketch.h"

namespace dimap::cpu {

// Where a module's threshold is expected: scores.
struct Threshold {
  double lowest = 0, likely = 0, highest = 1;
};

struct Guess {
  Bracket bracket;               // expected to hold the cut
  double aside = 0;              // expected number of weights inside the bracket
  std::vector<uint32_t> ladder;  // rising keys: grids for the weights beyond the bracket's, where they are many
  // All of the layer is one chunk, so that it can be read again while it is in the cache: a closer look then finds the
  // bracket, from the threshold, or in a layer alone in its module from what that keeps.
  bool close = false;
  bool look = false;  // whether it is worth it
  Threshold threshold;
  int64_t keep = 0;    // of a layer alone, else 0
  double density = 0;  // weights per unit of ln(magnitude) at the cut
};

// Brackets the cuts of one module, of which the given layers ([in the module]) are. sketches, guesses: [all layers].
void bracket_module(const Problem& problem, int64_t module, std::span<const int32_t> layers,
                    std::span<const Sketch> sketches, std::span<Guess> guesses);

}  // namespace dimap::cpu
