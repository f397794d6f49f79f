// One deciding read of the weights, and what it knows afterwards.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "core/table.h"
#include "cpu/isa/decide.h"
#include "cpu/parallel.h"
#include "cpu/select/bracket.h"
#include "cpu/select/chunks.h"

namespace dimap::cpu {

// Uninitialised, growing storage for what is set aside.
class Aside {
 public:
  void reserve(int64_t n);
  uint32_t* keys() { return keys_.get(); }
  uint16_t* positions() { return positions_.get(); }
  int64_t used = 0;

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint32_t[], Free> keys_;
  std::unique_ptr<uint16_t[], Free> positions_;
  int64_t capacity_ = 0;
};

struct LayerSums {
  int64_t kept = 0, atoms = 0;
  Energy energy;  // of the kept

  // Takes over what the kernel summed, its outliers too.
  void add(const Decided& out, const Bracket& bracket) {
    kept += out.kept;
    atoms += out.atoms;
    if (const u128 sum = out.grid_sum()) energy.add(sum, static_cast<int>(Grid(bracket.high).exponent) - 1);
    out.outliers->move_to(energy);
  }
};

// A few locks shared by all layers.
class LayerLocks {
 public:
  std::mutex& of(int32_t layer) { return locks_[static_cast<size_t>(layer) % locks_.size()]; }

 private:
  std::array<std::mutex, 64> locks_;
};

class Reading {
 public:
  Reading(const Problem& problem, const Pool& pool);

  // Reads every weight of the wanted layers ([layers], nonzero: yes), and forgets what it knew of them. masks:
  // [tensors] or empty. False when more than `budget` weights would be set aside. Throws NonFinite.
  bool read(std::span<const uint8_t> wanted, std::span<uint8_t* const> masks, int64_t budget);

  // The survey of one layer through a window, as far as the bracket lets it see.
  LayerTable table(int32_t layer, Window window, std::span<Bin> bins) const;

  std::vector<Chunk> chunks;
  std::vector<Guess> guesses;  // [layers]
  std::vector<LayerSums> layers;
  const uint32_t* keys(const Chunk& c) const { return aside_[c.worker]->keys() + c.begin; }
  const uint16_t* positions(const Chunk& c) const { return aside_[c.worker]->positions() + c.begin; }

 private:
  const Problem& problem_;
  const Pool& pool_;
  std::vector<std::unique_ptr<Aside>> aside_;          // [workers]
  std::vector<std::vector<int32_t>> chunks_of_layer_;  // [layers]
};

}  // namespace dimap::cpu
