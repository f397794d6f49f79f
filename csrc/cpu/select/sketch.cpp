#include "cpu/select/sketch.h"

#include <algorithm>

namespace dimap::cpu {

void Sketch::add(uint32_t first, uint32_t end, uint32_t only, double count, double square) {
  Step step{first, end, only, static_cast<float>(count), above_, 0, 0};
  const auto score = [&](uint32_t key) { return energy_ > 0 ? std::min(1.0, squared_value(key) / energy_) : 1.0; };
  step.high = score(std::min(step.end, kNonFinite - 1));
  above_ += count;
  energy_ += count * square;
  step.low = energy_ > 0 ? std::min(step.high, score(only != kMixed ? only : step.first)) : 0;
  if (only != kMixed) step.high = step.low;
  steps.push_back(step);
}

}  // namespace dimap::cpu
