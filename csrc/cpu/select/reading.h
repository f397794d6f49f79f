// One deciding read of the weights, and what it knows afterwards.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "core/table.h"
#include "cpu/isa/decide.h"
#include "cpu/large_pages.h"
#include "cpu/parallel.h"
#include "cpu/select/bracket.h"
#include "cpu/select/chunks.h"
#include "cpu/select/loader.h"

namespace dimap::cpu {

// What the deciding loop sets aside of one chunk: room for all of it.
struct ChunkAside {
  std::unique_ptr<uint32_t[]> keys = std::make_unique_for_overwrite<uint32_t[]>(Chunk::kWeights + Decided::kSlack);
  std::unique_ptr<uint16_t[]> positions = std::make_unique_for_overwrite<uint16_t[]>(Chunk::kWeights + Decided::kSlack);
};

// Values of a worker's chunks, one chunk after the other.
template <typename T>
class Row {
 public:
  T* room(int64_t n) {  // beyond those used
    if (used + n > capacity_) {
      const int64_t wanted = std::max(used + n, capacity_ * 3 / 2);
      values_.room_for<T>(wanted, used, wanted >= kLargeFrom);
      capacity_ = wanted;
    }
    return values_.template data<T>() + used;
  }
  const T* at(int64_t begin) const { return values_.template data<T>() + begin; }
  int64_t used = 0;

 private:
  static constexpr int64_t kLargeFrom = int64_t{1} << 21;  // on large pages: enough of them will be used
  LargeBuffer values_;
  int64_t capacity_ = 0;
};

struct Aside {
  Row<uint32_t> numbers;  // keys, or counts
  Row<uint16_t> positions;
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

// What happens to the weights when the cuts are known decides what must be known of those set aside. In memory each is
// put right in a mask, so its key and position are kept. Where all are read once more to be written, keys alone will
// do. Of 16-bit types, how many there are of each magnitude stands for the keys, and the positions are in order of
// these.
enum class Keeps { kPositions, kCounts };

class Reading {
 public:
  Reading(const Problem& problem, Loader& loader, const Pool& pool, Keeps keeps);

  // Reads every weight of the wanted layers ([layers], nonzero: yes), and forgets what it knew of them. masks:
  // [tensors] or empty. False when more than `budget` numbers would be set aside. Throws NonFinite.
  bool read(std::span<const uint8_t> wanted, std::span<uint8_t* const> masks, int64_t budget);

  // The survey of one layer through a window, as far as the bracket lets it see.
  LayerTable table(int32_t layer, Window window, std::span<Bin> bins) const;

  // How many numbers a layer's guess will set aside of this rank's weights, about; whether they will be counts alone.
  double expected(int32_t layer) const;
  bool counts(int32_t layer) const;

  // Of what was set aside of a chunk: calls body(key, weights) for each key, or for each of its magnitudes.
  template <typename Body>
  void for_aside(const Chunk& chunk, Body&& body) const {
    const uint32_t* numbers = keys(chunk);
    if (!chunk.counted) {
      for (int64_t i = 0; i < chunk.aside; ++i) body(numbers[i], int64_t{1});
      return;
    }
    const Magnitudes magnitudes(guesses[chunk.layer].bracket, problem_.tensors[chunk.tensor].dtype);
    for (int64_t i = 0; i < chunk.aside; ++i)
      if (numbers[i]) body(magnitudes.key(i), int64_t{numbers[i]});
  }

  std::vector<Chunk> chunks;
  std::vector<Guess> guesses;  // [layers]
  std::vector<LayerSums> layers;
  const uint32_t* keys(const Chunk& c) const { return aside_[c.worker].numbers.at(c.begin); }  // or counts
  const uint16_t* positions(const Chunk& c) const { return aside_[c.worker].positions.at(c.place); }

 private:
  // The magnitudes of a 16-bit type inside a bracket.
  struct Magnitudes {
    Magnitudes(const Bracket& bracket, DType dtype)
        : shift(granularity(dtype)),
          first((bracket.low + (1u << shift) - 1) >> shift),
          count(std::max<int64_t>(0, int64_t{(bracket.high + (1u << shift) - 1) >> shift} - first)) {}
    uint32_t key(int64_t i) const { return (first + static_cast<uint32_t>(i)) << shift; }
    // Within the count, even of weights that somebody changes while they are read.
    int64_t index(uint32_t key) const { return std::clamp<int64_t>(int64_t{key >> shift} - first, 0, count - 1); }
    int shift;
    uint32_t first;
    int64_t count;
  };
  bool counts(int32_t layer, DType dtype) const;  // alone

  const Problem& problem_;
  Loader& loader_;
  const Pool& pool_;
  const Keeps keeps_;
  std::vector<Aside> aside_;                           // [workers]
  std::vector<std::vector<int32_t>> chunks_of_layer_;  // [layers]
};

}  // namespace dimap::cpu
