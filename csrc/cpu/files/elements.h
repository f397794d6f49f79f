// Elements of any type, counted by their bits.
#pragma once

#include <cstdint>
#include <cstring>

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
  switch (size) {
    case 1:
      return count_set<uint8_t>(bytes, n, static_cast<uint8_t>(mask));
    case 2:
      return count_set<uint16_t>(bytes, n, static_cast<uint16_t>(mask));
    case 4:
      return count_set<uint32_t>(bytes, n, static_cast<uint32_t>(mask));
    default:
      return count_set<uint64_t>(bytes, n, mask);
  }
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
  switch (size) {
    case 1:
      return any_above<uint8_t>(bytes, n, static_cast<uint8_t>(mask), static_cast<uint8_t>(most));
    case 2:
      return any_above<uint16_t>(bytes, n, static_cast<uint16_t>(mask), static_cast<uint16_t>(most));
    case 4:
      return any_above<uint32_t>(bytes, n, static_cast<uint32_t>(mask), static_cast<uint32_t>(most));
    default:
      return any_above<uint64_t>(bytes, n, mask, most);
  }
}

}  // namespace dimap::cpu
