// A pruning from open files to open files, or one rank's part of it: decide, then write. What patterns keep is decided
// as it is written.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "core/exchange.h"
#include "cpu/files/io.h"
#include "cpu/select/decision.h"

namespace dimap::cpu {

// A file is not what it was when the cuts were found.
struct Changed : std::runtime_error {
  explicit Changed(int32_t tensor) : std::runtime_error("the input changed while it was read"), tensor(tensor) {}
  int32_t tensor;
};

// Elements that are no weights to prune, and where they go. An element is not zero if any bit of `mask` is set in it,
// or always where the mask is 0; of 1, 2, 4 or 8 bytes. It is a NaN if these bits are more than `most`; 0: never.
struct Elements {
  int32_t file;
  int64_t offset, count, size;
  uint64_t mask;
  int64_t place = -1;  // in the target; -1: they are only counted
  uint64_t most = 0;
};

// Where the weights of a tensor go in the target of its file.
struct Place {
  int64_t values;     // all weights, or those with any bit set, one after the other, where
  int64_t bits = -1;  // one bit a weight goes here
};

// Takes bytes of the output of a file, and where they lie in it; called by any worker, about in order.
using Sink = std::function<void(int32_t file, const char* memory, int64_t bytes, int64_t at)>;

// A file that takes every mask, one bit a weight.
struct MaskFile {
  File file;
  std::vector<int64_t> places;  // [tensors]
};

class FilePruning {
 public:
  // The problem's tensors lie in files; exchange: null where there is one rank. All must outlive this.
  FilePruning(const Problem& problem, const Pool& pool, const Exchange* exchange, int64_t aside_most = kAsideMost);

  const Decision* decision() const { return decision_ ? &*decision_ : nullptr; }  // null with patterns
  const std::vector<int64_t>& kept() const { return kept_; }  // [tensors] by the masks, of all ranks

  // How many kept weights have any bit set, [tensors], of all ranks: reads again what keeps zeros.
  std::vector<int64_t> count_packed();

  struct Written {
    std::vector<int64_t> rest;       // [rest] elements that are not zero, of this rank
    std::vector<int64_t> nonzero;    // [tensors] kept weights that are not zero, of this rank
    std::vector<uint32_t> smallest;  // [tensors] key of the smallest kept weight of this rank; kKeyEnd: none
    std::vector<char> nan;           // [rest] whether an element is a NaN, of this rank
  };
  // Writes this rank's part. places: [tensors]. With places for bits, count_packed comes first. Throws FileError,
  // Changed, and what the sink throws.
  Written write(const Sink& sink, std::span<const Place> places, std::span<const Elements> rest,
                const std::optional<MaskFile>& masks);

 private:
  struct Segment;
  struct Worker;
  std::vector<Chunk>& chunks() { return decision_ ? decision_->reading().chunks : groups_; }
  bool known(const Chunk& chunk) const { return decision_ && decision_->read()[chunk.layer]; }
  bool keeps_zeros(const Chunk& chunk) const;
  void share_ties();
  void mark_by_cut(const Chunk& chunk, const void* weights, uint8_t* mask) const;
  void prune_chunk(int number, Worker& worker, const Chunk& chunk, void* weights);  // number: the worker's
  void sum(std::span<int64_t> numbers) const {
    if (exchange_) exchange_->sum(numbers);
  }

  const Problem& problem_;
  const Pool& pool_;
  const Exchange* exchange_;
  Loader loader_;
  std::optional<Decision> decision_;
  std::vector<Chunk> groups_;          // with patterns
  int64_t most_ = Chunk::kWeights;     // weights of a chunk
  std::vector<int64_t> chunk_kept_;    // [chunks]
  std::vector<int64_t> chunk_packed_;  // [chunks], of all ranks, once counted
  std::vector<int64_t> kept_;          // [tensors]
};

// How many elements are not zero, [elements].
std::vector<int64_t> count_nonzero(const std::vector<File>& files, std::span<const Elements> elements,
                                   const Pool& pool);

}  // namespace dimap::cpu
