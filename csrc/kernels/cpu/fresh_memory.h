// Outputs live in memory that was just allocated: the kernel hands it over page by page when it is first written, which
// costs more than the write. These ask for it in larger steps. Hints: where the system does not know them, nothing
// happens.
#pragma once

#include <cstddef>

namespace dimap::cpu {

// The range will be written whole: back what lies in it of large pages with them.
void advise_large_pages(void* begin, size_t bytes);

// The range is about to be written whole: bring in its pages, in one call instead of one fault a page.
void populate(void* begin, size_t bytes);

}  // namespace dimap::cpu
