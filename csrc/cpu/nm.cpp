#include "cpu/nm.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "core/problem.h"
#include "cpu/apply.h"
#include "cpu/isa/decide.h"
#include "cpu/large_pages.h"
#include "cpu/select/chunks.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kPiece = int64_t{1} << 16;  // weights of a piece, about: with its mask it fits a processor's cache

struct Piece {
  Grouped part;
  int64_t tensor, offset, n;
};

std::vector<Piece> pieces_of(std::span<const Grouped> tensors, int m) {
  std::vector<Piece> pieces;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Grouped& g = tensors[t];
    const int64_t block = m * g.inner, step = std::max<int64_t>(kPiece / std::max<int64_t>(block, 1), 1);
    for (int64_t at = 0; at < g.blocks && block > 0; at += step) {
      Piece piece{g, static_cast<int64_t>(t), at * block, std::min(step, g.blocks - at) * block};
      piece.part.weights = static_cast<char*>(g.weights) + piece.offset * size_of(g.dtype);
      piece.part.mask = g.mask ? g.mask + piece.offset : nullptr;
      piece.part.blocks = piece.n / block;
      pieces.push_back(piece);
    }
  }
  return pieces;
}

// Throws for the first weight that is not finite, if there is one.
void check_finite(const void* given, int64_t n, DType dtype, int64_t tensor, int64_t offset) {
  for_type(dtype, [&]<DType kType>() {
    const auto* weights = static_cast<const storage_t<kType>*>(given);
    for (int64_t i = 0; i < n; ++i)
      if (const uint32_t key = key_of<kType>(weights[i]); key >= kNonFinite)
        throw NonFinite(tensor, offset + i, non_finite_name(key, weights[i], sizeof weights[i]));
  });
}

bool all_finite(const Piece& piece) {
  return for_type(piece.part.dtype, [&]<DType kType>() {
    using T = storage_t<kType>;
    const auto* weights = static_cast<const T*>(piece.part.weights);
    constexpr T kBits = static_cast<T>(infinity_bits(kType));
    T found = 0;  // no branch: a loop of vectors
    for (int64_t i = 0; i < piece.n; ++i) found |= static_cast<T>((weights[i] & kBits) == kBits);
    return found == 0;
  });
}

// Calls look(piece), which says whether all of it is finite; throws for the first piece that is not.
template <typename Look>
void each_finite(const std::vector<Piece>& pieces, const Pool& pool, Look&& look) {
  std::vector<uint8_t> bad(pieces.size());
  pool.for_each(static_cast<int64_t>(pieces.size()),
                [&](int64_t i, int) { bad[static_cast<size_t>(i)] = !look(pieces[static_cast<size_t>(i)]); });
  const auto first = std::find(bad.begin(), bad.end(), 1);
  if (first == bad.end()) return;
  const Piece& p = pieces[static_cast<size_t>(first - bad.begin())];
  check_finite(p.part.weights, p.n, p.part.dtype, p.tensor, p.offset);
}

// Marks the n largest of a row of m keys, of equal ones the first.
void mark_row(const uint32_t* keys, int64_t n, int64_t m, uint8_t* mask, std::vector<uint64_t>& ties) {
  if (n == 0 || n == m) {
    std::fill_n(mask, m, n != 0);
    return;
  }
  // By an exponent and three bits, which leave few for a closer look.
  constexpr int kShift = 20;
  uint32_t counts[kKeyEnd >> kShift] = {};
  for (int64_t i = 0; i < m; ++i) ++counts[keys[i] >> kShift];
  uint32_t cut = kKeyEnd >> kShift;
  int64_t left = n;
  while (left > counts[--cut]) left -= counts[cut];
  ties.resize(static_cast<size_t>(m));
  size_t count = 0;
  for (int64_t i = 0; i < m; ++i) {
    const uint32_t high = keys[i] >> kShift;
    mask[i] = high > cut;
    ties[count] = static_cast<uint64_t>(keys[i]) << 32 | static_cast<uint32_t>(~i);
    count += high == cut;
  }
  const auto begin = ties.begin(), end = begin + static_cast<int64_t>(count);
  std::nth_element(begin, begin + left - 1, end, std::greater<>());
  for (auto it = begin; it < begin + left; ++it) mask[static_cast<uint32_t>(~*it)] = 1;
}

// [blocks, m, inner]: some columns at a time become rows. Returns whether all of it is finite.
template <DType kType>
bool mark_rows(const Grouped& g, int64_t n, int64_t m) {
  constexpr int64_t kColumns = 16;
  const int64_t most = std::min(kColumns, g.inner);
  std::vector<uint32_t> keys(static_cast<size_t>(most * m));
  std::vector<uint8_t> marks(keys.size());
  std::vector<uint64_t> ties;
  uint32_t largest = 0;
  for (int64_t begin = 0; begin < g.blocks * m * g.inner; begin += m * g.inner) {
    for (int64_t column = 0; column < g.inner; column += most) {
      const int64_t columns = std::min(most, g.inner - column);
      const auto* weights = static_cast<const storage_t<kType>*>(g.weights) + begin + column;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < columns; ++c) keys[c * m + i] = key_of<kType>(weights[i * g.inner + c]);
      for (int64_t i = 0; i < columns * m; ++i) largest = std::max(largest, keys[i]);
      for (int64_t c = 0; c < columns; ++c) mark_row(keys.data() + c * m, n, m, marks.data() + c * m, ties);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < columns; ++c) g.mask[begin + column + i * g.inner + c] = marks[c * m + i];
    }
  }
  return largest < kNonFinite;
}

bool mark(const Grouped& g, int n, int m, uint8_t* mask) {
  const auto fn = kernels().mark[static_cast<int>(g.dtype)];
  return fn(g.weights, g.blocks, g.inner, n, m, mask) < infinity_bits(g.dtype);
}

}  // namespace

void mark_largest(const Grouped& piece, int64_t n, int64_t m, int64_t tensor, int64_t offset) {
  bool finite = true;
  if (m >= 2 && m <= kMostInGroup)
    finite = mark(piece, static_cast<int>(n), static_cast<int>(m), piece.mask);
  else
    for_type(piece.dtype, [&]<DType kType>() { finite = mark_rows<kType>(piece, n, m); });
  if (!finite) check_finite(piece.weights, piece.blocks * m * piece.inner, piece.dtype, tensor, offset);
}

void select_nm(std::span<const Grouped> tensors, int n, int m, const Pool& pool) {
  std::vector<Range> masks;
  for (const Grouped& g : tensors) masks.push_back({g.mask, static_cast<size_t>(g.blocks * m * g.inner)});
  advise_large_pages(std::move(masks));
  each_finite(pieces_of(tensors, m), pool, [&](const Piece& p) { return mark(p.part, n, m, p.part.mask); });
}

void zero_nm(std::span<const Grouped> tensors, int n, int m, const Pool& pool) {
  const std::vector<Piece> pieces = pieces_of(tensors, m);
  each_finite(pieces, pool, all_finite);
  int64_t most = 0;
  for (const Piece& p : pieces) most = std::max(most, p.n);
  std::vector<std::unique_ptr<uint8_t[]>> masks(static_cast<size_t>(pool.workers()));
  pool.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t i, int worker) {
    auto& mask = masks[static_cast<size_t>(worker)];
    if (!mask) mask = std::make_unique_for_overwrite<uint8_t[]>(static_cast<size_t>(most));
    const Piece& p = pieces[static_cast<size_t>(i)];
    mark(p.part, n, m, mask.get());
    apply_piece({p.part.weights, mask.get(), p.n, size_of(p.part.dtype)});
  });
}

}  // namespace dimap::cpu
