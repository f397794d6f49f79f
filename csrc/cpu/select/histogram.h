// How many weights of a layer have which magnitude, roughly: of a sample, or of all. Those of a layer's parts add up.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/exchange.h"
#include "cpu/select/sketch.h"

namespace dimap::cpu {

struct Histogram {
  struct Bin {
    uint32_t bin;   // of Sketch, or 2^coarse of them together
    int64_t count;  // weights in it,
    int64_t rest;   // and the sum of their keys' distances from the bin's first
  };
  std::vector<Bin> bins;  // nonempty ones, rising
  int coarse = 0;         // few weights are counted in wider bins: of one rank alone

  // Of a bin, its first key.
  uint32_t first_of(uint32_t bin) const { return Sketch::first_of(bin, coarse); }

  // Of a sample, which is taken in runs of neighbours: the sums over its runs of their energy and of the number of
  // weights in them above a likely cut, and of the squares of both.
  int64_t runs = 0;
  double energy = 0, energy_squares = 0;
  int64_t above = 0, above_squares = 0;
};

// Cells of all bins that a worker counts into: a count and a rest each.
class Cells {
 public:
  void add(uint32_t bin, int64_t count, int64_t rest) { cells_[bin].count += count, cells_[bin].rest += rest; }
  // Adds at least one key; returns the first and the last bin of all.
  std::pair<uint32_t, uint32_t> add_keys(std::span<const uint32_t> keys, int coarse = 0);
  int64_t count(uint32_t bin) const { return cells_[bin].count; }
  void take(Cells& other);                                            // and leaves the other empty
  std::vector<Histogram::Bin> move_out(uint32_t low, uint32_t high);  // of bins [low, high], which are empty afterwards

 private:
  struct Cell {
    int64_t count = 0, rest = 0;
  };
  std::vector<Cell> cells_ = std::vector<Cell>(Sketch::kBins);
};

// Adds up every layer's histogram over the ranks, in two exchanges.
void add_up(std::span<Histogram> histograms, const Exchange& exchange);

// total: weights of the layer. exact: all of them were counted.
Sketch sketch_of(const Histogram& histogram, int64_t total, bool exact);

}  // namespace dimap::cpu
