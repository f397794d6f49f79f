// Elements of any type as one bit each and the bytes of those that are not zero, in the order in which they compress.
//
// First the bits, as in pack.h; then a plane for each byte of an element, the least significant first: byte j of every
// element that is stored, in order. Before that each is rotated left by one bit, so that the exponent of a float32 or
// bfloat16 fills the last plane and the sign, as random as the mantissa, lies beside the mantissa.
#pragma once

#include <cstdint>

#include "cpu/sparse/pack.h"

namespace dimap::cpu {

// packing: of elements of 1, 2, 4 or 8 bytes, anywhere in memory. count: how many have any bit set. planes:
// [packing.bytes() + count * packing.size].
void split(const char* elements, const Packing& packing, int64_t count, uint8_t* planes);

// Back, from so many bytes; elements are written in full. Throws BadBits, of tensor 0, where bits and bytes do not fit.
void merge(const uint8_t* planes, int64_t bytes, const Packing& packing, char* elements);

}  // namespace dimap::cpu
