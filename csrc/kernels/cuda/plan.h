// What the device knows of a problem, and what it works out: plain structures shared by host and device.
#pragma once

#include <cstdint>

#include "../magnitude.h"

namespace dimap::cuda {

using Word = unsigned long long;  // what CUDA's 64-bit atomics take

// Tuning, as data. Not yet measured on a GPU.
struct Tuning {
  int threads = 256;      // in a block
  int blocks = 4;         // of emit's on a multiprocessor, at least: 64 registers a thread
  int chunk = 1 << 14;    // weights in one piece of work
  int most_bins = 1024;   // of a window; fewer where there are many layers
  int unroll = 4;         // 16-byte loads in flight in a thread, where registers do not matter;
  int emit_unroll = 2;    // where it has 64
  int sample_ratio = 32;  // one run of 32 weights in this many is sampled, where the layer is not small
  int sample_least = 4096;
};
constexpr Tuning kTuning{};
constexpr int kThreads = kTuning.threads;
constexpr int kChunk = kTuning.chunk;
constexpr int kLeastBins = 256;  // one window over all keys at shift 23
static_assert(kTuning.most_bins >= kLeastBins);
static_assert(kChunk <= 1 << 14, "the shared sums hold 2^16 weights: four chunks");

struct TensorEntry {
  const void* data;
  void* out;  // mask bytes, scores; null where there are none
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before it
  int32_t dtype;
  int32_t layer;
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
  uint32_t proven;  // nonzero: an exact solve placed it, so what lies above is kept and what lies below is dropped
  DIMAP_HD uint32_t end() const { return base + (bins << shift); }  // at most 2^31
};

constexpr uint32_t kNoTie = 0xFFFFFFFFu;

struct LayerState {
  View view;
  uint32_t keep_from;  // keys from here on are kept;
  uint32_t tie;        // those equal to this share the module's quota
  uint32_t ratio;      // of the sample, a power of two
};

struct ModuleState {
  double low, high;  // enclose the threshold
  double threshold;
  int64_t quota;
  int32_t decided;
  int32_t reserved;
};

// Why nothing was decided: a negative threshold.
constexpr int32_t kBadWeights = 1;  // an infinity or a NaN
constexpr int32_t kBadSolve = 2;    // too many rounds: a defect
constexpr double kThresholdOfBadWeights = -1.0;
constexpr double kThresholdOfBadSolve = -2.0;

// Columns of a table's row, as in ../wire.h: weights, weights above, their energy in words of 32 bits, then bins.
constexpr int kWords = 20;
constexpr int kHead = 2 + kWords;

// The narrowest window of at most `bins` bins over the keys [first, last], with bins no finer than `granularity`.
DIMAP_HD View view_over(uint32_t first, uint32_t last, int bins, int granularity) {
  uint32_t shift = static_cast<uint32_t>(granularity);
  while (shift < 23 &&
         (static_cast<uint64_t>(first >> shift << shift) + (static_cast<uint64_t>(bins) << shift)) <= last)
    ++shift;
  const uint32_t base = first >> shift << shift;
  uint32_t used = ((last - base) >> shift) + 1;
  if (used > static_cast<uint32_t>(bins)) used = static_cast<uint32_t>(bins);
  return {base, shift, used, kKeyEnd, 0, 0};
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
