#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/score/score_layer.h"

namespace dimap::cpu {
namespace {

// Least significant digit first, three digits.
constexpr int kBits = 11, kDigits = 3;
constexpr uint32_t kMask = (1u << kBits) - 1;
static_assert(kBits * kDigits >= 31);

struct Entry {
  uint32_t key, index;  // position in the layer
};

}  // namespace

void score_by_sort(std::span<const Piece> pieces, int64_t total, ScoreMemory& memory) {
  Entry* entries = memory.tables.room_for<Entry>(2 * total + (kDigits << kBits) / 2);
  Entry* sorted = entries + total;
  auto* places = reinterpret_cast<uint32_t*>(sorted + total);
  std::fill(places, places + (kDigits << kBits), 0);
  for (const Piece& piece : pieces) {
    for_type(piece.tensor->dtype, [&]<DType kType>() {
      const auto* w = weights_of<kType>(piece);
      for (int64_t i = 0; i < piece.n; ++i) {
        const uint32_t key = key_of<kType>(w[i]);
        entries[piece.start + i] = {key, static_cast<uint32_t>(piece.start + i)};
        for (int d = 0; d < kDigits; ++d) ++places[(d << kBits) + (key >> d * kBits & kMask)];
      }
    });
  }
  for (int d = 0; d < kDigits; ++d) {  // largest keys first
    uint32_t place = 0;
    uint32_t* digit = places + (d << kBits);
    for (int64_t v = kMask; v >= 0; --v) place += std::exchange(digit[v], place);
    for (int64_t i = 0; i < total; ++i) sorted[digit[entries[i].key >> d * kBits & kMask]++] = entries[i];
    std::swap(entries, sorted);
  }
  if (total != 0 && entries[0].key >= kNonFinite) throw FoundNonFinite();

  size_t p = 0;  // the piece of the last weight: neighbours in rank are rarely neighbours in place
  double energy = 0;
  for (int64_t i = 0; i < total;) {
    const uint32_t key = entries[i].key;
    const double square = squared_value(key);
    int64_t end = i;
    for (; end < total && entries[end].key == key; ++end) energy += square;  // equal magnitudes share their sum
    const auto score = static_cast<float>(score64(key, energy));
    for (; i < end; ++i) {
      const int64_t index = entries[i].index;
      if (pieces.size() > 1 && (index < pieces[p].start || index >= pieces[p].start + pieces[p].n)) {
        p = static_cast<size_t>(std::upper_bound(pieces.begin(), pieces.end(), index,
                                                 [](int64_t at, const Piece& piece) { return at < piece.start; }) -
                                pieces.begin()) -
            1;
      }
      pieces[p].scores[index - pieces[p].start + pieces[p].offset] = score;
    }
  }
}

}  // namespace dimap::cpu
