#include "fresh_memory.h"

#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older C libraries do not name it
#endif
#endif

namespace dimap::cpu {
namespace {

#if defined(__linux__)
// Calls madvise on the pages of `page` bytes that lie in the range as a whole; false where it is refused.
bool advise(void* begin, size_t bytes, size_t page, int advice) {
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  return first >= end || madvise(reinterpret_cast<void*>(first), end - first, advice) == 0;
}
#endif

}  // namespace

void advise_large_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  advise(begin, bytes, size_t{1} << 21, MADV_HUGEPAGE);
#endif
}

void populate([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  static std::atomic<bool> refused{false};
  if (!refused.load(std::memory_order_relaxed) && !advise(begin, bytes, page, MADV_POPULATE_WRITE))
    refused.store(true, std::memory_order_relaxed);
#endif
}

}  // namespace dimap::cpu
