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

}  // namespace dimap::cpu
