// Elements of any type as integers of their size.
#pragma once

#include <cstdint>

namespace dimap::cpu {

// Calls body(T{}) with the unsigned integer of 1, 2, 4 or 8 bytes that holds an element.
template <typename Body>
decltype(auto) for_size(int64_t size, Body&& body) {
  switch (size) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

}  // namespace dimap::cpu
