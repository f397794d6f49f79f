// What the device knows of a problem, and what it works out: plain structures shared by host and device.
#pragma once

#include <cstdint>

#include "core/magnitude.h"

namespace dimap::cuda {

using Word = unsigned long long;  // what CUDA's 64-bit atomics take

// Tuning, as data; not yet measured on a GPU. First what the host and the device must agree on.
struct Tuning {
  int threads = 256;            // in a block
  int chunk = 1 << 14;          // weights in one piece of work
  int most_bins = 1024;         // of a window; fewer where there are many layers
  int sample_ratio = 32;        // one run of 32 weights in this many is sampled, where the layer is not small,
  int sample_most = 1 << 22;    // or more, a power of two, so that about this many weights are
  int sample_least = 1 << 15;   // weights of a layer that are sampled, at least
  int least_aside = 256;        // bytes for what is set aside of a chunk, and
  int most_aside = 12 << 10;    // at most: one weight in eight of a float32 chunk
  int aside_budget = 15 << 20;  // bytes for all chunks, and
  int aside_share = 24;         // the weights' bytes over this
  int sorters = 512;            // threads of a block that sorts a bucket of scores, and
  int sorted = 13;              // keys of each, an odd number
  int most_buckets = 960;       // of a layer
  int table_threads = 1024;     // of a block that scores by a table
  int most_blocks = 2048;       // of a launch: where there is more work, each does more than one piece
};
#if defined(DIMAP_TUNING)
constexpr Tuning kTuning = DIMAP_TUNING;  // of tests: small pieces, so that small problems take every path
#else
constexpr Tuning kTuning{};
#endif

// Then what only the code for one architecture sees.
struct Occupancy {
  int architecture;  // and those after it, up to the next entry: 10 times the compute capability
  int blocks;        // of emit's on a multiprocessor, at least: 64 registers a thread
  int emit_unroll;   // its 16-byte loads in flight in a thread
  int read_blocks;   // of the deciding read's: 80 registers
  int read_unroll;   // its loads
  int unroll;        // loads where registers do not matter
};
constexpr Occupancy kOccupancies[] = {
    {80, 4, 2, 3, 2, 4}, {86, 4, 2, 3, 2, 4},  {89, 4, 2, 3, 2, 4},
    {90, 4, 2, 3, 2, 4}, {100, 4, 2, 3, 2, 4}, {120, 4, 2, 3, 2, 4},
};
constexpr Occupancy occupancy_of(int architecture) {
  Occupancy found = kOccupancies[0];
  for (const Occupancy& o : kOccupancies)
    if (o.architecture <= architecture) found = o;
  return found;
}
#if defined(__CUDA_ARCH__)
constexpr Occupancy kOccupancy = occupancy_of(__CUDA_ARCH__ / 10);
#else
constexpr Occupancy kOccupancy = occupancy_of(0);
#endif

constexpr int kThreads = kTuning.threads;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = kTuning.chunk;
constexpr int kLeastBins = 256;                                // one window over all keys at shift 23
constexpr int kBucketBins = 2048;                              // of the window that buckets of scores are told apart by
constexpr int kBucketSize = kTuning.sorters * kTuning.sorted;  // weights that a block sorts
constexpr int kMostBuckets = kTuning.most_buckets;
constexpr int64_t kMostBlocks = kTuning.most_blocks;
static_assert(kTuning.most_bins >= kLeastBins);
constexpr int kMostRatio = kChunk / 32;  // a run in a chunk
static_assert(kTuning.sample_ratio <= kMostRatio);
static_assert((kTuning.sample_ratio & (kTuning.sample_ratio - 1)) == 0, "places in a stratum are masked");
static_assert(kChunk <= 1 << 14, "the shared sums hold 2^16 weights: four chunks; positions in a chunk 16 bits");

struct TensorEntry {
  const void* data;
  void* out;  // mask bytes, scores; null where there are none
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before it
  int32_t dtype;
  int32_t layer;

  // Of one of its chunks, by the chunk's number in the plan: its first weight, and how many it has.
  DIMAP_HD int64_t begin_of(int64_t chunk) const { return (chunk - first_chunk) * kChunk; }
  DIMAP_HD int count_of(int64_t chunk) const {
    const int64_t left = numel - begin_of(chunk);
    return left < kChunk ? static_cast<int>(left) : kChunk;
  }
};
static_assert(sizeof(TensorEntry) == 40);

struct LayerEntry {
  int64_t total;  // weights
  int32_t module;
  int32_t granularity;  // low zero bits of every key
};

struct ModuleEntry {
  int64_t keep, total;
  int64_t first_chunk, last_chunk;  // [first, last) holds all chunks of the module, and maybe others
  int32_t first_layer, layers;      // its layers: order[first_layer, first_layer + layers)
};

// On the device: tensors (one more than there are, whose first_chunk is the number of chunks), layers, modules, order.
struct Plan {
  const TensorEntry* tensors;
  const LayerEntry* layers;
  const ModuleEntry* modules;
  const int32_t* order;
  int32_t tensor_count, layer_count, module_count;
  int64_t chunks;
};

// A window over keys: `bins` bins of 2^shift keys from `base` on; see dimap::Window for the two bounds.
struct View {
  uint32_t base, shift, bins, below_end, above_first;
  DIMAP_HD uint32_t end() const { return base + (bins << shift); }  // at most 2^31
};

constexpr uint32_t kNoTie = 0xFFFFFFFFu;

// What the deciding read made certain of a layer: keys from `high` on are kept, those below `low` dropped. In between
// its mask keeps those from `mark` on, until more is known, and the weights are set aside.
struct Bracket {
  uint32_t low, high, mark;
  int32_t holds;  // 0: the cut lies elsewhere, or too many weights lie inside: the layer is read again
};

struct LayerState {
  View view;
  double least, most;  // scores above the view are at least the one, those below it at most the other
  Bracket bracket;
  uint32_t keep_from;  // keys from here on are kept;
  uint32_t tie;        // those equal to this share the module's quota
  uint32_t ratio;      // of the sample, a power of two
};

struct ModuleState {
  double low, high;            // enclose the threshold
  double hint_low, hint_high;  // should enclose it
  double threshold;
  int64_t quota;
  int32_t decided;
  int32_t reserved;
};

// What the deciding read sets aside of each chunk: keys and positions in the chunk, in no order.
struct Aside {
  char* slots;     // [chunks, stride] bytes
  int32_t* count;  // [chunks] weights set aside, or what is below; null where there is no deciding read
  int32_t stride;
};
constexpr int32_t kOverrun = -1;   // more than a slot holds, or nothing was set aside: look at the chunk itself
constexpr int32_t kPutRight = -2;  // less the count: the mask is right but for ties

// A chunk's slot: float32 keys and then 16-bit positions; of a 16-bit type, magnitude and position in one word.
template <DType kType>
struct Slot {
  char* at;
  int32_t capacity;

  DIMAP_HD Slot(const Aside& aside, int64_t chunk)
      : at(aside.slots + chunk * aside.stride), capacity(aside.stride / (kType == DType::kFloat32 ? 6 : 4)) {}
  DIMAP_HD void put(uint32_t i, storage_t<kType> bits, int position) const {
    if constexpr (kType == DType::kFloat32) {
      reinterpret_cast<uint32_t*>(at)[i] = bits & 0x7FFFFFFFu;
      reinterpret_cast<uint16_t*>(at + 4 * int64_t{capacity})[i] = static_cast<uint16_t>(position);
    } else {
      reinterpret_cast<uint32_t*>(at)[i] = (uint32_t{bits} & 0x7FFFu) << 16 | static_cast<uint32_t>(position);
    }
  }
  DIMAP_HD uint32_t key(int i) const {
    const uint32_t word = reinterpret_cast<const uint32_t*>(at)[i];
    if constexpr (kType == DType::kFloat32) return word;
    return key_of<kType>(static_cast<storage_t<kType>>(word >> 16));
  }
  DIMAP_HD int position(int i) const {
    if constexpr (kType == DType::kFloat32) return reinterpret_cast<const uint16_t*>(at + 4 * int64_t{capacity})[i];
    return static_cast<int>(reinterpret_cast<const uint32_t*>(at)[i] & 0xFFFFu);
  }
};

// Why nothing was decided. The first two: a negative threshold.
constexpr int32_t kBadWeights = 1;  // an infinity or a NaN
constexpr int32_t kBadSolve = 2;    // too many rounds: a defect
constexpr int32_t kBadRows = 3;     // windows, cuts or keep that a stage does not take
constexpr double kThresholdOfBadWeights = -1.0;
constexpr double kThresholdOfBadSolve = -2.0;

// Columns of a table's row, as in core/wire.h: weights, weights above, their energy in words of 32 bits, then bins.
constexpr int kWords = 20;
constexpr int kHead = 2 + kWords;
DIMAP_HD constexpr int64_t columns_of(int bins) { return kHead + 3 * static_cast<int64_t>(bins); }

// The narrowest window of at most `bins` bins over the keys [first, last], with bins no finer than `granularity`.
DIMAP_HD View view_over(uint32_t first, uint32_t last, int bins, int granularity) {
  uint32_t shift = static_cast<uint32_t>(granularity);
  while (shift < 23 &&
         (static_cast<uint64_t>(first >> shift << shift) + (static_cast<uint64_t>(bins) << shift)) <= last)
    ++shift;
  const uint32_t base = first >> shift << shift;
  uint32_t used = ((last - base) >> shift) + 1;
  if (used > static_cast<uint32_t>(bins)) used = static_cast<uint32_t>(bins);
  return {base, shift, used, kKeyEnd, 0};
}

// Sends value · 2^bit to a sum of 32-bit words as terms below 2^32, so that 2^32 terms fit a word: add(word, term).
template <typename Add>
DIMAP_HD void split_words(uint64_t value, int bit, Add&& add) {
  const int word = bit / 32, shift = bit % 32;
  const uint64_t low = (value & 0xFFFFFFFFu) << shift, high = (value >> 32) << shift;
  const uint64_t middle = (low >> 32) + (high & 0xFFFFFFFFu);  // below 2^33
  if (low & 0xFFFFFFFFu) add(word, low & 0xFFFFFFFFu);
  if (middle & 0xFFFFFFFFu) add(word + 1, middle & 0xFFFFFFFFu);
  const uint64_t rest = (high >> 32) + (middle >> 32);
  if (rest) add(word + 2, rest);
}

}  // namespace dimap::cuda
