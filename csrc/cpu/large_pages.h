// Memory that was just allocated is handed over page by page when it is first written: large pages make that, and
// scattered access afterwards, cheaper. A hint: where the system does not know it, nothing happens.
#pragma once

#include <cstddef>

namespace dimap::cpu {

// The range will be written whole: back what lies in it of large pages with them.
void advise_large_pages(void* begin, size_t bytes);

}  // namespace dimap::cpu
