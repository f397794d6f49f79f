#include "cpu/large_pages.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <new>
#include <string>
#if defined(__linux__)
#include <linux/mman.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace dimap::cpu {
namespace {

constexpr size_t kPage = size_t{1} << 21;
constexpr uintptr_t kGap = uintptr_t{1} << 14;  // between neighbours: what an allocator keeps there, or a small tensor

constexpr int kFew = 64;  // small pages in the place of a large one: not worth keeping

#if defined(MADV_COLLAPSE)
// Whether the system's owner wants no large pages: MADV_COLLAPSE would make them nevertheless.
bool are_forbidden() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return std::getline(file, line) && line.find("[never]") != std::string::npos;
}
#endif

}  // namespace

void advise_large_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (first >= end || madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) != 0) return;
#if defined(MADV_COLLAPSE)
  // Where a few small pages are there already, because an allocator keeps its notes between the tensors, no large one
  // would come by itself.
  static const bool forbidden = are_forbidden();
  if (forbidden) return;
  const auto small = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident(kPage / small);
  for (uintptr_t page = first; page < end; page += kPage) {
    void* at = reinterpret_cast<void*>(page);
    if (mincore(at, kPage, resident.data()) != 0) return;
    const auto there = std::count_if(resident.begin(), resident.end(), [](unsigned char c) { return c & 1; });
    if (there > 0 && there < kFew && madvise(at, kPage, MADV_COLLAPSE) != 0) return;
  }
#endif
#endif
}

void advise_large_pages(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const auto end_of = [](const Range& range) { return reinterpret_cast<uintptr_t>(range.begin) + range.bytes; };
  for (size_t i = 0; i < ranges.size();) {
    const Range first = ranges[i];
    uintptr_t end = end_of(first);
    for (++i; i < ranges.size() && reinterpret_cast<uintptr_t>(ranges[i].begin) <= end + kGap; ++i)
      end = std::max(end, end_of(ranges[i]));
    advise_large_pages(first.begin, end - reinterpret_cast<uintptr_t>(first.begin));
  }
}

void* LargeBuffer::grow(size_t bytes, size_t used, bool large) {
  if (bytes <= size_) return memory_.get();
  if (used == 0) memory_.reset(), size_ = 0;  // two would be in the way
  const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
  std::unique_ptr<void, Free> memory(std::aligned_alloc(kPage, rounded));
  if (!memory) throw std::bad_alloc();
  if (large) advise_large_pages(memory.get(), rounded);
  if (used) std::memcpy(memory.get(), memory_.get(), used);
  memory_ = std::move(memory);
  size_ = rounded;
  return memory_.get();
}

}  // namespace dimap::cpu
