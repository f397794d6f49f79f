#include "cpu/score/parted.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/select/chunks.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kBlock = Parted::kBlock;

// A cursor whose address is a multiple of a block's size stands in no block.
template <typename T>
bool at_end(const T* cursor) {
  return reinterpret_cast<uintptr_t>(cursor) % (kBlock * sizeof(T)) == 0;
}

template <typename T>
T* begin_block(T* begin) {
  for (int64_t i = 0; i < kBlock; i += static_cast<int64_t>(64 / sizeof(T)))
    __builtin_prefetch(begin + i, std::is_const_v<T> ? 0 : 1);
  return begin;
}

}  // namespace

void Parted::part(std::span<const Piece> pieces) {
  pieces_ = pieces;
  int64_t weights = 0;
  for (const Piece& piece : pieces) weights += piece.n;
  // Every bucket may have a block that is not full.
  const int64_t room = weights / kBlock + std::min(weights, int64_t{kBuckets}) + 1;
  scores_ = memory_.room_for<float>(room * kBlock + room * kBlock / 2);
  low_ = reinterpret_cast<uint16_t*>(scores_ + room * kBlock);
  cursors_.resize(kBuckets);
  bucket_.resize(static_cast<size_t>(room));
  const void** cursors = cursors_.data();
  uint16_t* bucket = bucket_.data();
  int64_t blocks = 0;
  for (const Piece& piece : pieces) {
    for_type(piece.tensor->dtype, [&]<DType kType>() {
      const auto* w = weights_of<kType>(piece);
      for (int64_t i = 0; i < piece.n; ++i) {
        const uint32_t key = key_of<kType>(w[i]);
        const uint32_t b = key >> kBucketShift;
        auto* cursor = static_cast<uint16_t*>(const_cast<void*>(cursors[b]));
        if (at_end(cursor)) {
          bucket[blocks] = static_cast<uint16_t>(b);
          cursor = begin_block(low_ + blocks++ * kBlock);
        }
        *cursor = static_cast<uint16_t>(key);
        cursors[b] = cursor + 1;
      }
    });
  }
  bucket_.resize(static_cast<size_t>(blocks));

  lowest_ = kBuckets, end_ = 0;
  for (const uint32_t b : bucket_) {
    lowest_ = std::min(lowest_, b);
    end_ = std::max(end_, b + 1);
  }
  first_.resize(kBuckets + 1);
  place_.resize(kBuckets + 1);
  last_.resize(kBuckets);
  for (uint32_t b = lowest_; b < end_; ++b) place_[b] = 0;
  for (const uint16_t b : bucket_) ++place_[b];
  uint32_t place = 0;
  for (uint32_t b = lowest_; b < end_; ++b) {
    first_[b] = place;
    place += std::exchange(place_[b], place);
    const auto* cursor = static_cast<const uint16_t*>(cursors_[b]);
    if (cursor != nullptr) last_[b] = static_cast<uint8_t>(at_end(cursor) ? kBlock : (cursor - low_) % kBlock);
  }
  sorted_.resize(bucket_.size());
  for (size_t block = 0; block < bucket_.size(); ++block)
    sorted_[place_[bucket_[block]]++] = static_cast<uint32_t>(block);
  forget_cursors();
}

int64_t Parted::runs_of(uint32_t bucket, std::vector<Run>& runs) const {
  if (bucket < lowest_ || bucket >= end_) return 0;
  int64_t n = 0;
  for (uint32_t i = first_[bucket]; i < place_[bucket]; ++i) {
    const int64_t begin = int64_t{sorted_[i]} * kBlock;
    const int64_t filled = i + 1 == place_[bucket] ? last_[bucket] : kBlock;
    runs.push_back({low_ + begin, scores_ + begin, filled});
    n += filled;
  }
  return n;
}

void Parted::hand_back() {
  const void** cursors = cursors_.data();
  int64_t blocks = 0;
  for (const Piece& piece : pieces_) {
    for_type(piece.tensor->dtype, [&]<DType kType>() {
      const auto* w = weights_of<kType>(piece);
      float* out = piece.scores + piece.offset;
      for (int64_t i = 0; i < piece.n; ++i) {
        const uint32_t b = key_of<kType>(w[i]) >> kBucketShift;
        auto* cursor = static_cast<const float*>(cursors[b]);
        if (at_end(cursor)) cursor = begin_block<const float>(scores_ + blocks++ * kBlock);
        out[i] = *cursor;
        cursors[b] = cursor + 1;
      }
    });
  }
  forget_cursors();
}

void Parted::forget_cursors() {
  for (const uint16_t b : bucket_) cursors_[b] = nullptr;
}

}  // namespace dimap::cpu
