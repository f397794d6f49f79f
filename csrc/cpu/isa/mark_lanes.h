// Marking the n largest of every group of weights, with the vectors of decide_lanes.h. Each lane has a group: a network
// sorts its halves, whose merge has the n-th largest magnitude, and what is not below that is marked. Where more are
// than n, some tie with it, and the last of them are taken back. Groups too small to be turned into lanes are ranked
// where they stand: a weight's rank is how many of its group come before it.
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
  using Bytes = typename Lanes::Bytes;
  using Lane = std::make_signed_t<T>;  // magnitudes are below its sign bit
  static constexpr int kParts = sizeof(T), kLanes = Lanes::kBytes / kParts;
  static constexpr int kStep = Lanes::kBytes;  // weights whose mask fills a vector
  static constexpr Lane kMost = std::numeric_limits<Lane>::max();

  Signed largest{};  // of all that were seen

  static DIMAP_HD Signed magnitude(const T* from) { return loaded<Signed>(from) & kMost; }
  DIMAP_HD Signed key(const T* from) {
    const Signed key = magnitude(from);
    largest = max(key, largest);
    return key;
  }
  static DIMAP_HD Signed max(Signed a, Signed b) { return a > b ? a : b; }
  static DIMAP_HD Signed min(Signed a, Signed b) { return a < b ? a : b; }

  static DIMAP_HD Bytes narrow(const Signed* kept) {
    if constexpr (kParts == 4)
      return Lanes::narrow(kept[0], kept[1], kept[2], kept[3]);
    else
      return Lanes::narrow(kept[0], kept[1]);
  }
  static DIMAP_HD void store(Bytes kept, uint8_t* mask) {
    kept &= 1;
    memcpy(mask, &kept, sizeof kept);
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

  // Groups of kM weights side by side, compared inside of a vector.
  template <int kM>
  void small(const T* weights, int64_t blocks, int n, uint8_t* mask) {
    const Lane limit = static_cast<Lane>(n);
    const int64_t end = blocks * kM / kStep * kStep;
    for (int64_t at = 0; at < end; at += kStep) {
      Signed kept[kParts];
      for (int p = 0; p < kParts; ++p)
        kept[p] = rank<kM>(key(weights + at + p * kLanes), std::make_integer_sequence<int, kM - 1>{}) < limit;
      store(narrow(kept), mask + at);
    }
    strided(weights + end, blocks - end / kM, 1, n, kM, mask + end);
  }

  // Batcher's odd-even merge sort, the largest first.
  template <int kCount, int kApart>
  static DIMAP_HD void merge(Signed* keys) {
    if constexpr (2 * kApart < kCount) {
      merge<kCount, 2 * kApart>(keys);
      merge<kCount, 2 * kApart>(keys + kApart);
#pragma GCC unroll 16
      for (int i = kApart; i + kApart < kCount; i += 2 * kApart) order(keys[i], keys[i + kApart]);
    } else {
      order(keys[0], keys[kApart]);
    }
  }
  template <int kCount>
  static DIMAP_HD void sort(Signed* keys) {
    if constexpr (kCount > 1) {
      sort<kCount / 2>(keys);
      sort<kCount / 2>(keys + kCount / 2);
      merge<kCount, 1>(keys);
    }
  }
  static DIMAP_HD void order(Signed& a, Signed& b) {
    const Signed high = max(a, b);
    b = min(a, b), a = high;
  }

  // The n-th largest of two sorted halves together: of all ways to take n of their largest, the one whose least is the
  // most. around: memory that is only used here, so that n need not be known when this is compiled.
  template <int kHalf>
  struct Around {
    Signed keys[3 * kHalf + 1];
    DIMAP_HD Around() {
      for (Signed& one : keys) one = Signed{} - 1;
      keys[kHalf] = Signed{} + kMost;
    }
  };
  template <int kHalf>
  static DIMAP_HD Signed nth(const Signed* first, const Signed* second, int n, Around<kHalf>& around) {
    for (int i = 0; i < kHalf; ++i) around.keys[kHalf + 1 + i] = second[i];
    const Signed* last = around.keys + kHalf + n;
    Signed found = last[0];
#pragma GCC unroll 16
    for (int i = 1; i <= kHalf; ++i) found = max(found, min(first[i - 1], last[-i]));
    return found;
  }

  // [blocks, m, inner], m up to kM: columns side by side, at least kStep of them.
  template <int kM>
  void columns(const T* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
    Around<kM / 2> around;
    // A processor does not foresee rows that lie in as many pages: it is told of those of the next block.
    const int64_t ahead = std::max<int64_t>(m * inner, 1 << 13);
    for (int64_t b = 0; b < blocks; ++b, weights += m * inner, mask += m * inner) {
      for (int64_t step = 0; step < inner; step += kStep) {
        const int64_t at = std::min(step, inner - kStep);  // the last ones once more
        for (int64_t i = at; i < at + m * inner; i += inner) {
          for (int line = 0; line < kStep; line += 64 / kParts) __builtin_prefetch(weights + i + ahead + line);
          __builtin_prefetch(mask + i + ahead, 1);
        }
        if constexpr (kM <= 4)
          rank_columns<kM>(weights + at, inner, n, m, mask + at);
        else
          sort_columns<kM / 2>(weights + at, inner, n, m, mask + at, around);
      }
    }
  }

  // kStep columns of few weights, in each of which every two are compared.
  template <int kM>
  DIMAP_HD void rank_columns(const T* weights, int64_t inner, int n, int m, uint8_t* mask) {
    Signed kept[kM][kParts];
    for (int p = 0; p < kParts; ++p) {
      Signed keys[kM], ranks[kM];
      for (int i = 0; i < kM; ++i) {
        keys[i] = i < m ? key(weights + i * inner + p * kLanes) : Signed{} - 1;
        ranks[i] = Signed{} + static_cast<Lane>(i);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
        for (int j = i + 1; j < kM; ++j) {
          const Signed larger = keys[j] > keys[i];
          ranks[i] -= larger, ranks[j] += larger;
        }
      for (int i = 0; i < kM; ++i) kept[i][p] = ranks[i] < static_cast<Lane>(n);
    }
    for (int i = 0; i < m; ++i) store(narrow(kept[i]), mask + i * inner);
  }

  // kStep columns of more.
  template <int kHalf>
  DIMAP_HD void sort_columns(const T* weights, int64_t inner, int n, int m, uint8_t* mask, Around<kHalf>& around) {
    Signed cut[kParts];
    for (int p = 0; p < kParts; ++p) {
      const T* from = weights + p * kLanes;
      Signed first[kHalf], second[kHalf];
      for (int i = 0; i < kHalf; ++i) {
        first[i] = key(from + i * inner);
        second[i] = i + kHalf < m ? key(from + (i + kHalf) * inner) : Signed{} - 1;
      }
      sort<kHalf>(first), sort<kHalf>(second);
      cut[p] = nth(first, second, n, around);
    }
    Bytes more = Bytes{} - static_cast<uint8_t>(n);
    for (int i = 0; i < m; ++i) {
      Signed kept[kParts];
      for (int p = 0; p < kParts; ++p) kept[p] = magnitude(weights + i * inner + p * kLanes) >= cut[p];
      const Bytes marked = narrow(kept);
      more -= marked;
      store(marked, mask + i * inner);
    }
    if (Lanes::bits(reinterpret_cast<Bytes>(more != 0))) take_back(weights, inner, cut, n, m, mask);
  }

  // Of kStep columns, marked down to their cuts: the last of those equal to it are no more marked where they are too
  // many.
  static void take_back(const T* weights, int64_t inner, const Signed* cut, int n, int m, uint8_t* mask) {
    Signed more[kParts];
    for (int p = 0; p < kParts; ++p) {
      more[p] = Signed{} - static_cast<Lane>(n);
      for (int i = 0; i < m; ++i) more[p] -= magnitude(weights + i * inner + p * kLanes) >= cut[p];
    }
    for (int i = m - 1; i >= 0; --i) {
      Signed kept[kParts];
      for (int p = 0; p < kParts; ++p) {
        const Signed own = magnitude(weights + i * inner + p * kLanes);
        const Signed over = (own == cut[p]) & (more[p] > 0);
        more[p] += over;
        kept[p] = (own >= cut[p]) & ~over;
      }
      store(narrow(kept), mask + i * inner);
    }
  }

  // Lanes a and b in turns, of the lower or the upper half of each 16 bytes.
  template <int kUpper, int... kLane>
  static DIMAP_HD Signed interleaved(Signed a, Signed b, std::integer_sequence<int, kLane...>) {
    constexpr int kUnit = 16 / sizeof(T);
    const Signed places = {
        static_cast<Lane>(kLane / kUnit * kUnit + kUpper * kUnit / 2 + kLane % kUnit / 2 + kLane % 2 * kLanes)...};
    return __builtin_shuffle(a, b, places);
  }
  // In each 16 bytes the lane of this number, everywhere.
  template <int kNumber, int... kLane>
  static DIMAP_HD Signed spread(Signed v, std::integer_sequence<int, kLane...>) {
    constexpr int kUnit = 16 / sizeof(T);
    const Signed places = {static_cast<Lane>(kLane / kUnit * kUnit + kNumber)...};
    return __builtin_shuffle(v, places);
  }
  template <int... kLane>
  static DIMAP_HD Signed swapped(Signed v, std::integer_sequence<int, kLane...>) {
    const Signed places = {static_cast<Lane>((kLane + kLanes / 2) % kLanes)...};
    return __builtin_shuffle(v, places);
  }

  // Groups of kM weights side by side, of 16 bytes or more. The 16 bytes of as many groups as they have lanes are
  // turned, so that each group has a lane, or two, one in either half of a vector of 32 bytes.
  template <int kM>
  void adjacent(const T* weights, int64_t blocks, int n, uint8_t* mask) {
    constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
    constexpr int kUnit = 16 / sizeof(T), kSplit = kM > kUnit && Lanes::kBytes == 32 ? 2 : 1;
    constexpr int kVectors = kM / kSplit, kSets = kVectors / kUnit, kHalf = kM / 2;
    constexpr int64_t kBatch = kVectors * kLanes;
    const int64_t end = blocks * kM / kBatch * kBatch;
    Around<kHalf> around;
    for (int64_t at = 0; at < end; at += kBatch) {
      Signed turned[kVectors];
      for (int set = 0; set < kSets; ++set) {
        Signed* here = turned + set * kUnit;
        for (int i = 0; i < kUnit; ++i) here[i] = key(weights + at + (i * kSets + set) * kLanes);
        for (int done = 1; done < kUnit; done *= 2) {
          Signed next[kUnit];
          for (int i = 0; i < kUnit / 2; ++i) {
            next[2 * i] = interleaved<0>(here[i], here[i + kUnit / 2], kAll);
            next[2 * i + 1] = interleaved<1>(here[i], here[i + kUnit / 2], kAll);
          }
          for (int i = 0; i < kUnit; ++i) here[i] = next[i];
        }
      }
      for (int half = 0; half < kVectors; half += kHalf) sort<kHalf>(turned + half);
      Signed second[kHalf];
      for (int i = 0; i < kHalf; ++i) second[i] = kSplit == 2 ? swapped(turned[i], kAll) : turned[kVectors - kHalf + i];
      const Signed cut = nth(turned, second, n, around);
      Signed cuts[kUnit];
      [&]<int... kNumber>(std::integer_sequence<int, kNumber...>) {
        ((cuts[kNumber] = spread<kNumber>(cut, kAll)), ...);
      }(std::make_integer_sequence<int, kUnit>{});
      for (int v = 0; v < kVectors; v += kParts) {
        const T* from = weights + at + v * kLanes;
        Signed kept[kParts], tied[kParts];
        for (int p = 0; p < kParts; ++p) {
          const Signed own = magnitude(from + p * kLanes), least = cuts[(v + p) / kSets];
          kept[p] = own >= least, tied[p] = own == least;
        }
        const Bytes marked = narrow(kept);
        store(marked, mask + at + v * kLanes);
        const uint32_t bits = Lanes::bits(marked);
        if (__builtin_popcount(bits) != kStep / kM * n)
          take_back<kM>(bits, Lanes::bits(narrow(tied)), n, mask + at + v * kLanes);
      }
    }
    strided(weights + end, blocks - end / kM, 1, n, kM, mask + end);
  }

  // As above, of kStep weights as bits.
  template <int kM>
  static void take_back(uint32_t kept, uint32_t tied, int n, uint8_t* mask) {
    constexpr uint32_t kGroup = (uint32_t{1} << kM) - 1;
    for (int group = 0; group < kStep; group += kM) {
      uint32_t last = kept & tied & kGroup << group;
      for (int more = __builtin_popcount(kept >> group & kGroup) - n; more > 0 && last; --more) {
        const uint32_t bit = uint32_t{1} << (31 - __builtin_clz(last));
        last ^= bit, kept ^= bit;
      }
    }
    for (int i = 0; i < kStep; ++i) mask[i] = kept >> i & 1;
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
      any_columns(values, 1, kStep, n, m, marks);
      each([&](int place, int64_t to) { mask[to] = marks[place]; });
    }
  }

  void any_columns(const T* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
    if (m == 2) return columns<2>(weights, blocks, inner, n, m, mask);
    if (m <= 4) return columns<4>(weights, blocks, inner, n, m, mask);
    if (m <= 8) return columns<8>(weights, blocks, inner, n, m, mask);
    columns<16>(weights, blocks, inner, n, m, mask);
  }
};

template <typename Lanes, typename T>
uint32_t mark_groups(const void* given, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
  const auto* weights = static_cast<const T*>(given);
  Marker<Lanes, T> marker;
  if (inner == 1 && m == 2)
    marker.template small<2>(weights, blocks, n, mask);
  else if (inner == 1 && m == 4)
    marker.template small<4>(weights, blocks, n, mask);
  else if (inner == 1 && m == 8)
    marker.template adjacent<8>(weights, blocks, n, mask);
  else if (inner == 1 && m == 16)
    marker.template adjacent<16>(weights, blocks, n, mask);
  else if (inner >= Lanes::kBytes)
    marker.any_columns(weights, blocks, inner, n, m, mask);
  else
    marker.strided(weights, blocks, inner, n, m, mask);
  uint32_t largest = 0;
  for (int lane = 0; lane < marker.kLanes; ++lane)
    largest = std::max(largest, static_cast<uint32_t>(marker.largest[lane]));
  return largest;
}

}  // namespace
}  // namespace dimap::cpu
