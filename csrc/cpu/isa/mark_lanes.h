// Marking the largest of every group of weights, with the vectors of decide_lanes.h: a weight's rank is how many of its
// group come before it, and the mask keeps the ranks below n. No branch depends on a weight.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/isa/decide_lanes.h"

namespace dimap::cpu {
namespace {

template <typename Lanes, typename T>
struct Marker {
  using Signed = std::conditional_t<sizeof(T) == 4, typename Lanes::SignedWords, typename Lanes::SignedShorts>;
  using Lane = std::make_signed_t<T>;  // magnitudes are below its sign bit
  static constexpr int kParts = sizeof(T), kLanes = Lanes::kBytes / kParts;
  static constexpr int kStep = Lanes::kBytes;  // weights whose mask fills a vector

  Signed largest{};  // of all that were seen

  DIMAP_HD Signed key(const T* from) {
    const Signed magnitude = loaded<Signed>(from) & std::numeric_limits<Lane>::max();
    largest = magnitude > largest ? magnitude : largest;
    return magnitude;
  }

  static DIMAP_HD void store(const Signed* kept, uint8_t* mask) {
    typename Lanes::Bytes marked;
    if constexpr (kParts == 4)
      marked = Lanes::narrow(kept[0], kept[1], kept[2], kept[3]);
    else
      marked = Lanes::narrow(kept[0], kept[1]);
    marked &= 1;
    memcpy(mask, &marked, sizeof marked);
  }

  // Which lanes come after the one that stands kTurn further in their group of kM, the first after the last.
  template <int kM, int kTurn, int... kLane>
  static DIMAP_HD Signed behind(Signed own, std::integer_sequence<int, kLane...>) {
    const Signed other = {static_cast<Lane>(kLane / kM * kM + (kLane + kTurn) % kM)...};
    const Signed ties = {static_cast<Lane>((kLane + kTurn) % kM < kLane % kM ? 1 : 0)...};  // the other one is earlier
    return __builtin_shuffle(own, other) > own - ties;
  }
  template <int kM, int... kTurn>
  static DIMAP_HD Signed rank(Signed own, std::integer_sequence<int, kTurn...>) {
    Signed rank{};
    ((rank -= behind<kM, kTurn + 1>(own, std::make_integer_sequence<int, kLanes>{})), ...);
    return rank;
  }

  // Groups of kM weights side by side: compared inside of a vector.
  template <int kM>
  void adjacent(const T* weights, int64_t blocks, int n, uint8_t* mask) {
    if constexpr (kM > kLanes) return strided(weights, blocks, 1, n, kM, mask);
    const Lane limit = static_cast<Lane>(n);
    const int64_t end = blocks * kM / kStep * kStep;
    for (int64_t at = 0; at < end; at += kStep) {
      Signed kept[kParts];
      for (int p = 0; p < kParts; ++p)
        kept[p] = rank<kM>(key(weights + at + p * kLanes), std::make_integer_sequence<int, kM - 1>{}) < limit;
      store(kept, mask + at);
    }
    strided(weights + end, blocks - end / kM, 1, n, kM, mask + end);
  }

  // [blocks, m, inner]: columns side by side, at least kStep of them.
  void columns(const T* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
    const Lane limit = static_cast<Lane>(n);
    Signed keys[kMostInGroup][kParts];
    for (int64_t b = 0; b < blocks; ++b, weights += m * inner, mask += m * inner) {
      for (int64_t step = 0; step < inner; step += kStep) {
        const int64_t at = std::min(step, inner - kStep);  // the last ones once more
        for (int i = 0; i < m; ++i)
          for (int p = 0; p < kParts; ++p) keys[i][p] = key(weights + i * inner + at + p * kLanes);
        for (int i = 0; i < m; ++i) {
          Signed kept[kParts];
          for (int p = 0; p < kParts; ++p) {
            const Signed own = keys[i][p];
            Signed rank{};
            for (int j = 0; j < i; ++j) rank -= keys[j][p] >= own;
            for (int j = i + 1; j < m; ++j) rank -= keys[j][p] > own;
            kept[p] = rank < limit;
          }
          store(kept, mask + i * inner + at);
        }
      }
    }
  }

  // Groups of any size, whose weights are `inner` apart: brought into columns.
  void strided(const T* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
    T values[kMostInGroup * kStep] = {};
    uint8_t marks[kMostInGroup * kStep];
    for (int64_t group = 0, groups = blocks * inner; group < groups; group += kStep) {
      const auto count = static_cast<int>(std::min<int64_t>(kStep, groups - group));
      const auto each = [&](auto&& visit) {
        int64_t at = group / inner * m * inner + group % inner, column = group % inner;
        for (int g = 0; g < count; ++g, ++at) {
          for (int i = 0; i < m; ++i) visit(i * kStep + g, at + i * inner);
          if (++column == inner) column = 0, at += (m - 1) * inner;
        }
      };
      each([&](int place, int64_t from) { values[place] = weights[from]; });
      columns(values, 1, kStep, n, m, marks);
      each([&](int place, int64_t to) { mask[to] = marks[place]; });
    }
  }
};

template <typename Lanes, typename T>
uint32_t mark_groups(const void* given, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
  const auto* weights = static_cast<const T*>(given);
  Marker<Lanes, T> marker;
  if (inner == 1 && m == 2)
    marker.template adjacent<2>(weights, blocks, n, mask);
  else if (inner == 1 && m == 4)
    marker.template adjacent<4>(weights, blocks, n, mask);
  else if (inner == 1 && m == 8)
    marker.template adjacent<8>(weights, blocks, n, mask);
  else if (inner == 1 && m == 16)
    marker.template adjacent<16>(weights, blocks, n, mask);
  else if (inner >= Lanes::kBytes)
    marker.columns(weights, blocks, inner, n, m, mask);
  else
    marker.strided(weights, blocks, inner, n, m, mask);
  uint32_t largest = 0;
  for (int lane = 0; lane < marker.kLanes; ++lane)
    largest = std::max(largest, static_cast<uint32_t>(marker.largest[lane]));
  return largest;
}

}  // namespace
}  // namespace dimap::cpu
