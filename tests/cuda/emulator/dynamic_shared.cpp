#include "emulator.h"

namespace dimap::cuda {
alignas(16) thread_local uint32_t dynamic_shared[1 << 16];
}
