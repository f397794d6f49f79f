// Who else holds weights of the same problem: nobody, or other ranks whose numbers are added up.
#pragma once

#include <cstdint>
#include <span>

namespace dimap {

class Exchange {
 public:
  virtual ~Exchange() = default;
  // Replaces the numbers by their sums over all ranks; every rank calls it with as many. Throws where a rank has
  // failed.
  virtual void sum(std::span<int64_t> numbers) const = 0;
};

}  // namespace dimap
