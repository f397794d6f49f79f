// From sketches to brackets: where each layer's cut is expected.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/isa/decide.h"
#include "cpu/select/sketch.h"

namespace dimap::cpu {

struct Guess {
  Bracket bracket;               // expected to hold the cut
  double aside = 0;              // expected number of weights inside the bracket
  std::vector<uint32_t> ladder;  // rising keys: grids for the weights beyond the bracket's, where they are many
};

// Brackets the cuts of one module, of which the given layers ([in the module]) are. sketches, guesses: [all layers].
void bracket_module(const Problem& problem, int64_t module, std::span<const int32_t> layers,
                    std::span<const Sketch> sketches, std::span<Guess> guesses);

}  // namespace dimap::cpu
