#include "cpu/files/groups.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <deque>

#include "cpu/files/io.h"
#include "cpu/sizes.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kElements = int64_t{1} << 20;  // read at a time, about
constexpr int kLargest = 16;

struct Item {
  size_t tensor;
  int64_t outer, count;  // of a tensor with inner 1: rows
};

struct Worker {
  Buffer bytes, flags;
  std::vector<uint8_t> sums;  // [kLargest + 1, inner]
};

template <typename T>
void flags_of(const char* bytes, int64_t n, T mask, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) {
    T element;
    std::memcpy(&element, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    flags[i] = (element & mask) != 0;
  }
}

// Elements [begin, begin + n) of a tensor, a byte of 0 or 1 each.
uint8_t* load_flags(const File& file, const Grid3& t, int64_t begin, int64_t n, Worker& worker) {
  auto* flags = reinterpret_cast<uint8_t*>(worker.flags.room(n + kLargest));
  if (t.size == 0) {
    const int64_t first = t.offset + begin, byte = first / 8, bytes = (first + n + 7) / 8 - byte;
    char* memory = worker.bytes.room(bytes);
    read_fully(file, memory, bytes, byte);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t bit = first % 8 + i;
      flags[i] = static_cast<uint8_t>(memory[bit / 8]) >> bit % 8 & 1;
    }
    return flags;
  }
  char* memory = worker.bytes.room(n * t.size);
  read_fully(file, memory, n * t.size, t.offset + begin * t.size);
  for_size(t.size, [&]<typename T>(T) { flags_of<T>(memory, n, static_cast<T>(t.mask), flags); });
  return flags;
}

// The most ones in a group of m neighbours, or m as soon as one is full. Behind the flags is room to read on.
uint8_t most_of(const uint8_t* flags, int64_t n, int m) {
  const auto mask = [](int bytes) { return bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1; };
  const uint64_t low = mask(m), high = m > 8 ? mask(m - 8) : 0;
  int most = 0;
  for (int64_t at = 0; at < n && most < m; at += m) {
    uint64_t words[2];
    std::memcpy(words, flags + at, sizeof words);
    most = std::max(most, std::popcount(words[0] & low) + std::popcount(words[1] & high));
  }
  return static_cast<uint8_t>(most);
}

struct Found {
  std::atomic<int64_t> nonzero{0};
  std::atomic<uint8_t> most[kLargest + 1] = {};
  bool open(int m) const { return most[m].load(std::memory_order_relaxed) < m; }  // still to be looked at
  void raise(int m, uint8_t value) {
    uint8_t before = most[m].load();
    while (before < value && !most[m].compare_exchange_weak(before, value)) {
    }
  }
};

// Groups that stand side by side in rows.
void look_at_rows(const uint8_t* flags, int64_t n, Found& found) {
  for (int m = 2; m <= kLargest; ++m)
    if (found.open(m)) found.raise(m, most_of(flags, n, m));
}

// One more row of columns, each of which goes through the groups. row: its number in the length.
void look_at_columns(const uint8_t* flags, int64_t row, int64_t inner, std::vector<uint8_t>& sums, Found& found) {
  for (int m = 2; m <= kLargest; ++m) {
    if (!found.open(m)) continue;
    uint8_t* sum = sums.data() + m * inner;
    if (row % m == 0) std::memset(sum, 0, static_cast<size_t>(inner));
    for (int64_t i = 0; i < inner; ++i) sum[i] = static_cast<uint8_t>(sum[i] + flags[i]);
    if (row % m != m - 1) continue;
    uint8_t most = 0;
    for (int64_t i = 0; i < inner; ++i) most = std::max(most, sum[i]);
    found.raise(m, most);
  }
}

}  // namespace

std::vector<Most> count_groups(const std::vector<File>& files, std::span<const Grid3> tensors, const Pool& pool) {
  std::vector<Item> items;
  std::deque<Found> found(tensors.size());
  int64_t bytes = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Grid3& g = tensors[t];
    for (int m = 0; m <= kLargest; ++m)
      if (m < 2 || g.length % m != 0) found[t].most[m] = static_cast<uint8_t>(m);
    if (g.numel() == 0) continue;
    const int64_t step = std::max<int64_t>(kElements / (g.length * g.inner), 1);
    for (int64_t at = 0; at < g.outer; at += step) items.push_back({t, at, std::min(step, g.outer - at)});
    bytes += g.size ? g.numel() * g.size : g.numel() / 8;
  }
  pool.begin("reading", bytes);
  std::deque<Worker> workers(static_cast<size_t>(pool.workers()));
  pool.for_each(static_cast<int64_t>(items.size()), [&](int64_t i, int w) {
    const Item& item = items[static_cast<size_t>(i)];
    const Grid3& g = tensors[item.tensor];
    Worker& worker = workers[static_cast<size_t>(w)];
    Found& mine = found[item.tensor];
    int64_t nonzero = 0;
    // A matrix may be far longer than what is read at a time; a row of it is not.
    const int64_t all = item.count * g.length * g.inner, row = g.inner == 1 ? g.length : g.inner;
    const int64_t step = std::max<int64_t>(kElements / row, 1) * row;
    if (g.inner > 1) worker.sums.resize(static_cast<size_t>((kLargest + 1) * g.inner));
    for (int64_t at = 0; at < all; at += step) {
      const int64_t n = std::min(step, all - at);
      const uint8_t* flags = load_flags(files[g.file], g, item.outer * g.length * g.inner + at, n, worker);
      for (int64_t j = 0; j < n; ++j) nonzero += flags[j];
      if (g.inner == 1)
        look_at_rows(flags, n, mine);
      else
        for (int64_t j = 0; j < n; j += row)
          look_at_columns(flags + j, (at + j) / row % g.length, row, worker.sums, mine);
      pool.advance(g.size ? n * g.size : n / 8);
    }
    mine.nonzero += nonzero;
  });
  std::vector<Most> out(tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    out[t].nonzero = found[t].nonzero;
    for (int m = 0; m <= kLargest; ++m) out[t].most[static_cast<size_t>(m)] = found[t].most[m];
  }
  return out;
}

}  // namespace dimap::cpu
