#include "cpu/select/closer_look.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/select/reading.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_engine.py.
constexpr struct {
  int looks = 4;
  uint32_t near = 1 << 20;  // a bracket that spans so many keys, an eighth of an octave, is worth another look
  double slack = 1e-5;      // of a score
} kTuning;

// A magnitude's key, whole or nearly.
uint32_t key_at(double magnitude) { return std::bit_cast<uint32_t>(static_cast<float>(std::min(magnitude, 0x1p127))); }

class CloserLook {
 public:
  CloserLook(DecideFn decide, const void* weights, int64_t n, ExponentSums& outliers, Guess& guess)
      : decide_(decide), weights_(weights), n_(n), outliers_(outliers), guess_(guess) {
    guess.keep ? by_count() : by_threshold();
    Bracket& bracket = guess.bracket;
    if (bracket.atom < bracket.low || bracket.atom >= bracket.high) bracket.atom = Bracket::kNoAtom;
  }

 private:
  // Where a weight has this score, if that is all the energy of the weights as large.
  static uint32_t key_of(double score, double energy) { return key_at(std::sqrt(score * energy)); }

  // The weights from a key on.
  LayerSums above(uint32_t key) {
    const Bracket bracket{key, key};
    LayerSums sums;
    sums.add(decide_from(decide_, weights_, n_, bracket, nullptr, &outliers_), bracket);
    return sums;
  }

  // The energy above some key bounds the scores on both sides of it: where the threshold is as expected, the cut lies
  // in the bracket.
  void by_threshold() {
    const Threshold& t = guess_.threshold;
    Bracket& bracket = guess_.bracket;
    for (int look = 0; look < kTuning.looks; ++look) {
      const uint32_t at = bracket.guess;
      const LayerSums sums = above(at);
      if (sums.kept == 0) return;
      const double energy = sums.energy.value();
      bracket.low = std::max(1u, std::min(at, key_of(t.lowest / (1 + kTuning.slack), energy)));
      bracket.high = std::max(at, std::min(kNonFinite, key_of(t.highest * (1 + kTuning.slack), energy) + 1));
      bracket.guess = std::clamp(key_of(t.likely, energy), bracket.low, bracket.high);
      if (bracket.high - bracket.low < kTuning.near) return;
    }
  }

  // Counts close in on the cut from both sides.
  void by_count() {
    uint32_t low = 1, high = kNonFinite, at = guess_.bracket.guess;
    const double density = std::max(1.0, guess_.density);
    for (int look = 0; look < kTuning.looks && low < at && at < high; ++look) {
      const auto off = static_cast<double>(above(at).kept - guess_.keep);
      (off >= 0 ? low : high) = at;
      // Beyond the cut, so that it is between the two.
      const double step = (1.2 * std::abs(off) + 2 * std::sqrt(std::abs(off)) + 4) / density;
      const double next = std::sqrt(squared_value(at)) * std::exp(off >= 0 ? step : -step);
      at = key_at(next);
    }
    guess_.bracket.low = low, guess_.bracket.high = high;
    guess_.bracket.guess = std::clamp(guess_.bracket.guess, low, high);
  }

  DecideFn decide_;
  const void* weights_;
  int64_t n_;
  ExponentSums& outliers_;
  Guess& guess_;
};

}  // namespace

void look_closer(DecideFn decide, const void* weights, int64_t n, ExponentSums& outliers, Guess& guess) {
  CloserLook(decide, weights, n, outliers, guess);
}

}  // namespace dimap::cpu
