// Elements of any type, counted by their bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/sizes.h"

namespace dimap::cpu {

template <typename T>
int64_t count_set(const char* bytes, int64_t n, T mask) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    T element;
    std::memcpy(&element, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));  // files do not align them
    count += (element & mask) != 0;
  }
  return count;
}

// How many of n elements of `size` bytes have a bit of the mask set; with mask 0, all.
inline int64_t count_set(const char* bytes, int64_t n, int64_t size, uint64_t mask) {
  if (mask == 0) return n;
  return for_size(size, [&]<typename T>(T) { return count_set<T>(bytes, n, static_cast<T>(mask)); });
}

template <typename T>
bool any_above(const char* bytes, int64_t n, T mask, T most) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) {
    T element;
    std::memcpy(&element, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    found |= static_cast<T>(element & mask) > most;
  }
  return found;
}

// Whether any of n elements of `size` bytes is a NaN: its magnitude, the bits of the mask, is above `most`; 0: none is.
inline bool any_nan(const char* bytes, int64_t n, int64_t size, uint64_t mask, uint64_t most) {
  if (most == 0) return false;
  return for_size(size,
                  [&]<typename T>(T) { return any_above<T>(bytes, n, static_cast<T>(mask), static_cast<T>(most)); });
}

}  // namespace dimap::cpu
