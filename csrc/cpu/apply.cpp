#include "cpu/apply.h"

#include <algorithm>
#include <vector>

namespace dimap::cpu {
namespace {

constexpr int64_t kPiece = int64_t{1} << 17;

template <typename T>
void apply_as(T* weights, const uint8_t* mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) weights[i] = mask[i] ? weights[i] : T{0};
}

}  // namespace

void apply_piece(const Applied& p) {
  if (p.size == 4)
    apply_as(static_cast<uint32_t*>(p.weights), p.mask, p.n);
  else
    apply_as(static_cast<uint16_t*>(p.weights), p.mask, p.n);
}

void apply(std::span<const Applied> work, const Pool& pool) {
  std::vector<Applied> pieces;
  for (const Applied& w : work)
    for (int64_t at = 0; at < w.n; at += kPiece)
      pieces.push_back({static_cast<char*>(w.weights) + at * w.size, w.mask + at, std::min(kPiece, w.n - at), w.size});
  pool.for_each(static_cast<int64_t>(pieces.size()),
                [&](int64_t i, int) { apply_piece(pieces[static_cast<size_t>(i)]); });
}

}  // namespace dimap::cpu
