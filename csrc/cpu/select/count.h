// A sketch of each layer from all of its weights: one read, for layers that no sample describes.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/parallel.h"
#include "cpu/select/histogram.h"
#include "cpu/select/loader.h"

namespace dimap::cpu {

// Replaces the sketches of the wanted layers ([layers], nonzero: yes).
void count_layers(const Problem& problem, std::span<const uint8_t> wanted, Loader& loader, const Pool& pool,
                  const Exchange* exchange, std::span<Sketch> sketches);

}  // namespace dimap::cpu
