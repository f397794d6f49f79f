// Memory that was just allocated is handed over page by page when it is first written: large pages make that, and
// scattered access afterwards, cheaper. A hint: where the system does not know it, nothing happens.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/problem.h"

namespace dimap::cpu {

// The range will be written whole: back what lies in it of large pages with them.
void advise_large_pages(void* begin, size_t bytes);

struct Range {
  void* begin;
  size_t bytes;
};

// Ranges that were allocated in one go mostly lie side by side: together they fill large pages, one by one they do not.
void advise_large_pages(std::vector<Range> ranges);

// What is written for each weight of the problem's tensors.
template <typename T>
void advise_outputs(const Problem& problem, std::span<T* const> outputs) {
  std::vector<Range> ranges;
  for (size_t t = 0; t < outputs.size(); ++t)
    ranges.push_back({outputs[t], static_cast<size_t>(problem.tensors[t].numel) * sizeof(T)});
  advise_large_pages(std::move(ranges));
}

// Uninitialised memory that grows and never shrinks, on large pages.
class LargeBuffer {
 public:
  // Room for n values of T, of which the first `used` are kept. large: on large pages; those take time where little of
  // them is used.
  template <typename T>
  T* room_for(int64_t n, int64_t used = 0, bool large = true) {
    return static_cast<T*>(grow(static_cast<size_t>(n) * sizeof(T), static_cast<size_t>(used) * sizeof(T), large));
  }

  template <typename T>
  T* data() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  void* grow(size_t bytes, size_t used, bool large);

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

}  // namespace dimap::cpu
