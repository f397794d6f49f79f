// Tables as rows of int64, so that a tensor sum or an all-reduce adds surveys.
//
// Row: weights in the layer, weights above the window, their energy as 20 words of 32 bits (unit 2^-298), then for each
// bin its count and the two words of its energy. Words may exceed 32 bits after additions: up to 2^31 surveys add up.
#pragma once

#include <bit>
#include <cstdint>
#include <span>

#include "core/table.h"

namespace dimap {

constexpr int64_t kWireWords = 20;
constexpr int64_t kWireHead = 2 + kWireWords;
constexpr int64_t wire_columns(int64_t bins) { return kWireHead + 3 * bins; }
constexpr int64_t wire_bins(int64_t columns) { return (columns - kWireHead) % 3 ? -1 : (columns - kWireHead) / 3; }

// A window's row: first key, log2 of the keys in a bin, low zero bits of every key in the layer, and what is known of
// the weights beside it: Window::below_end, above_first, and the bits of below_high and above_low.
constexpr int64_t kWindowColumns = 7;

struct WireWindow {
  Window window;
  int granularity;
};

inline void write_window(const WireWindow& view, int64_t* row) {
  row[0] = view.window.base;
  row[1] = view.window.shift;
  row[2] = view.granularity;
  row[3] = view.window.below_end;
  row[4] = view.window.above_first;
  row[5] = std::bit_cast<int64_t>(view.window.below_high);
  row[6] = std::bit_cast<int64_t>(view.window.above_low);
}

inline WireWindow read_window(const int64_t* row) {
  return {{static_cast<uint32_t>(row[0]), static_cast<int>(row[1]), static_cast<uint32_t>(row[3]),
           static_cast<uint32_t>(row[4]), std::bit_cast<double>(row[5]), std::bit_cast<double>(row[6])},
          static_cast<int>(row[2])};
}

inline void write_table(const LayerTable& table, int64_t* row) {
  row[0] = table.total;
  row[1] = table.above;
  for (int i = 0; i < kWireWords; ++i)
    row[2 + i] =
        static_cast<int64_t>(table.above_energy.limbs()[static_cast<size_t>(i / 2)] >> (i % 2 * 32) & 0xFFFFFFFFu);
  int64_t* out = row + kWireHead;
  for (const Bin& bin : table.bins) {
    *out++ = bin.count;
    *out++ = static_cast<int64_t>(bin.low);
    *out++ = static_cast<int64_t>(bin.high);
  }
}

// Replaces what a table says of the weights, but for where it looks. bins: those of the table.
inline void read_sums(const int64_t* row, LayerTable& table, std::span<Bin> bins) {
  table.total = row[0];
  table.above = row[1];
  table.above_energy = {};
  for (int i = 0; i < kWireWords; ++i) table.above_energy.add(static_cast<u128>(row[2 + i]), 16 * i);
  const int64_t* in = row + kWireHead;
  for (Bin& bin : bins) {
    bin.count = *in++;
    bin.low = static_cast<uint64_t>(*in++);
    bin.high = static_cast<uint64_t>(*in++);
  }
  table.bins = bins;
}

// bins: storage for the table's bins, as many as the row has.
inline LayerTable read_table(const int64_t* row, const WireWindow& view, std::span<Bin> bins) {
  LayerTable table;
  table.look_through(view.window, view.window.end(static_cast<int64_t>(bins.size())), view.window.base);
  table.granularity = view.granularity;
  read_sums(row, table, bins);
  return table;
}

}  // namespace dimap
