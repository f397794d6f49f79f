// A layer's weights parted by the high bits of their keys, and their scores on the way back.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.h"
#include "cpu/isa/rows.h"
#include "cpu/large_pages.h"

namespace dimap::cpu {

struct Piece {  // of a tensor, and where it starts in the layer
  const TensorView* tensor;
  float* scores;  // of the tensor
  int64_t offset, n, start;
};

template <DType kType>
const storage_t<kType>* weights_of(const Piece& piece) {
  return static_cast<const storage_t<kType>*>(piece.tensor->data) + piece.offset;
}

// The low bits of a share of the layer's weights, bucket by bucket. Each bucket fills blocks of its own, numbered in
// the order in which they were begun: going through the same weights again meets the blocks in the same order, so no
// weight's place is stored. 6 bytes a weight.
class Parted {
 public:
  static constexpr uint32_t kBuckets = kKeyEnd >> kBucketShift;
  static constexpr int64_t kBlock = 128;  // weights of one bucket that lie together

  void part(std::span<const Piece> pieces);

  // The buckets in use: [lowest(), end()).
  uint32_t lowest() const { return lowest_; }
  uint32_t end() const { return end_; }
  int64_t blocks() const { return static_cast<int64_t>(bucket_.size()); }

  // Appends the blocks of a bucket, and returns how many weights they hold.
  int64_t runs_of(uint32_t bucket, std::vector<Run>& runs) const;

  // Writes the scores that the runs now hold to where the weights were.
  void hand_back();

 private:
  void forget_cursors();

  std::span<const Piece> pieces_;
  LargeBuffer memory_;
  uint16_t* low_ = nullptr;              // [blocks, kBlock]
  float* scores_ = nullptr;              // [blocks, kBlock]
  std::vector<uint16_t> bucket_;         // [blocks]
  std::vector<const void*> cursors_;     // [kBuckets] where a bucket goes on; null between calls
  std::vector<uint8_t> last_;            // [kBuckets] weights in a bucket's last block
  std::vector<uint32_t> first_, place_;  // [kBuckets + 1] where a bucket's blocks begin in sorted_, and end
  std::vector<uint32_t> sorted_;         // [blocks] by bucket
  uint32_t lowest_ = 0, end_ = 0;
};

}  // namespace dimap::cpu
