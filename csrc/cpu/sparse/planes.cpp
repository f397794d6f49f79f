#include "cpu/sparse/planes.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/sizes.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kStep = 4096;  // elements: they fit in the fastest cache; a multiple of 8

template <typename T>
constexpr int64_t kSize = sizeof(T);

}  // namespace

void split(const char* elements, const Packing& packing, int64_t count, uint8_t* planes) {
  uint8_t *bits = planes, *to = planes + packing.bytes();
  for_size(packing.size, [&]<typename T>(T) {
    T dense[kStep], values[kStep + 8];
    for (int64_t at = 0; at < packing.n; at += kStep) {
      const int64_t n = std::min(kStep, packing.n - at);
      std::memcpy(dense, elements + at * kSize<T>, static_cast<size_t>(n * kSize<T>));
      const T* end = pack_chunk(dense, n, bits + at / 8, values, values + kStep + 8);
      const int64_t stored = end - values;
      for (int64_t j = 0; j < kSize<T>; ++j) {
        uint8_t* plane = to + j * count;
        const auto turn = static_cast<int>(8 * j - 1);  // of an element that is rotated left by one, byte j comes first
        for (int64_t i = 0; i < stored; ++i) plane[i] = static_cast<uint8_t>(std::rotr(values[i], turn));
      }
      to += stored;
    }
  });
}

void merge(const uint8_t* planes, int64_t bytes, const Packing& packing, char* elements) {
  const int64_t count = (bytes - packing.bytes()) / packing.size;
  const uint8_t *bits = planes, *from = planes + packing.bytes();
  if (bytes < packing.bytes() || (bytes - packing.bytes()) % packing.size) throw BadBits(0, packing.bytes(), bytes);
  if (packing.n % 8 && bits[packing.n / 8] >> packing.n % 8) throw BadBits(0, -1, -1);
  if (const int64_t ones = count_bits(bits, packing.bytes()); ones != count) throw BadBits(0, ones, count);
  for_size(packing.size, [&]<typename T>(T) {
    T dense[kStep], values[kStep];
    for (int64_t at = 0; at < packing.n; at += kStep) {
      const int64_t n = std::min(kStep, packing.n - at), stored = count_bits(bits + at / 8, (n + 7) / 8);
      for (int64_t i = 0; i < stored; ++i) {
        uint64_t value = 0;
        for (int64_t j = 0; j < kSize<T>; ++j) value |= uint64_t{from[j * count + i]} << 8 * j;
        values[i] = std::rotr(static_cast<T>(value), 1);
      }
      from += stored;
      unpack_chunk(bits + at / 8, values, stored, dense, n, kSize<T>);
      std::memcpy(elements + at * kSize<T>, dense, static_cast<size_t>(n * kSize<T>));
    }
  });
}

}  // namespace dimap::cpu
