// What the engine believes of a layer before it reads it: a coarse histogram of magnitudes, with the scores at its
// edges.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace dimap::cpu {

struct Sketch {
  // Bins of magnitude keys, 64 to an octave; denormals too, whose keys rise with their magnitude itself.
  static constexpr int kShift = 17;
  static constexpr int kDenormals = 1 + 23 * 64;  // bins of zero, alone, and of the denormals
  static constexpr int kBins = static_cast<int>(kKeyEnd >> kShift) - 64 + kDenormals;
  static constexpr uint32_t kMixed = 0xFFFFFFFFu;
  static constexpr double kAtomShare = 1.0 / 32;  // one magnitude with more of its layer than this is an atom

  static uint32_t bin_of(uint32_t key) {
    if (key >> 23) return (key >> kShift) - 64 + kDenormals;
    return key == 0 ? 0 : (std::bit_cast<uint32_t>(static_cast<float>(key)) >> kShift) - 127 * 64 + 1;
  }
  static uint32_t first_of(uint32_t bin) {  // key
    if (bin >= kDenormals) return (bin - kDenormals + 64) << kShift;
    return bin == 0 ? 0 : static_cast<uint32_t>(std::ceil(std::bit_cast<float>((bin - 1 + 127 * 64) << kShift)));
  }

  // 2^coarse bins together, within an octave; zero stays alone.
  static uint32_t coarser(uint32_t bin, int coarse) { return (bin + (1u << coarse) - 1) >> coarse; }
  static uint32_t first_of(uint32_t bin, int coarse) {  // key
    return first_of(bin == 0 ? 0 : (bin << coarse) - (1u << coarse) + 1);
  }

  struct Step {           // a nonempty bin
    uint32_t first, end;  // keys
    uint32_t only;        // the one key in it, as far as is known; else kMixed
    float count;          // weights in it,
    double above;         // and in all larger ones
    double low, high;     // scores at its two edges; of an atom both are its own
  };

  std::vector<Step> steps;  // largest magnitudes first
  double total = 0;         // weights
  double scale = 1;         // weights that one counted weight stands for
  double deviation = 0;     // of the energy, relative
  double clustering = 1.5;  // neighbours are alike: variance of a count over that of independent draws
  bool exact = false;       // all weights were counted: each is in the bin that it is said to be in
  int coarse = 0;           // as in its histogram

  // Adds the next lower bin, of the keys [first, end): `count` weights of mean square `square`.
  void add(uint32_t first, uint32_t end, uint32_t only, double count, double square);

 private:
  double above_ = 0, energy_ = 0;
};

}  // namespace dimap::cpu
