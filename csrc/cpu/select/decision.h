// The loop that every pruning goes through, wherever the weights lie: guess, read, solve; and again where that was not
// enough.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/exchange.h"
#include "core/problem.h"
#include "core/solve.h"
#include "cpu/parallel.h"
#include "cpu/select/reading.h"
#include "cpu/select/survey.h"

namespace dimap::cpu {

constexpr int64_t kAsideMost = int64_t{1} << 25;  // numbers that are set aside of weights in files: 128 MiB

using Flags = std::vector<uint8_t>;

// Finds the cuts, in up to three looks at a module: through brackets that a sample suggests; where that was not sure or
// wrong, through brackets that a count of all its weights proves, nearly; and where even these hold too many weights or
// not the cut, through surveys.
class Decision {
 public:
  // exchange: where other ranks hold weights of the same layers; all of them decide together. masks: [tensors], which
  // the reading writes already, or none. Throws NonFinite, FileError, and what the exchange throws.
  Decision(const Problem& problem, const Pool& pool, const Exchange* exchange, Keeps keeps,
           std::span<uint8_t* const> masks, int64_t aside_most = kAsideMost);

  std::vector<Cut> cuts;           // [layers]
  std::vector<ModuleCut> modules;  // [modules]
  int readings = 0;                // of all weights, or of those of some layers

  Reading& reading() { return reading_; }
  Loader& loader() { return loader_; }
  // [layers] of which all that the cut needs is among what the reading set aside; a mask that it wrote is right but for
  // that.
  const Flags& read() const { return read_; }
  std::vector<int64_t> quotas() const;

 private:
  void decide(std::span<uint8_t* const> masks);
  Flags layers_of(const Flags& modules_wanted) const;
  bool readable(int32_t layer) const;
  void read(const Flags& which, std::span<uint8_t* const> masks);
  static int64_t bins_of(const Guess& guess);
  void solve_open(Flags& open, bool surveys);
  void add_up(std::span<const int32_t> layers, std::span<LayerTable> tables, std::vector<Bin>& bins,
              Survey& seen) const;
  bool solve_module(int64_t module, const std::vector<LayerTable>& tables);
  bool suffices(size_t layer) const;

  const Problem& problem_;
  const Pool& pool_;
  const Exchange* exchange_;
  Loader loader_;
  Reading reading_;
  int64_t budget_;                            // numbers that may be set aside
  Flags read_;                                // [layers]
  std::vector<std::vector<int32_t>> layers_;  // [modules]
  // What is left to solve: layers whose cuts are not settled, and how many weights these keep together.
  std::vector<std::vector<int32_t>> unsettled_;  // [modules]
  std::vector<int64_t> keep_;                    // [modules]
  std::vector<int64_t> bins_;                    // [layers] of a window over what was set aside
  std::vector<Window> windows_;                  // [layers]
  const int64_t survey_bins_;                    // of a window over all weights
};

}  // namespace dimap::cpu
