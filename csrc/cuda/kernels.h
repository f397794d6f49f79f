// The CUDA kernels' launchers: raw device pointers and a stream in, cudaError_t out. Nothing here waits for the device,
// and everything can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/rows.h"

namespace dimap::cuda {

// Copies host bytes to the device as kernel arguments: no buffer has to outlive the call, so a graph may replay it.
cudaError_t upload(void* to, const void* from, int64_t bytes, cudaStream_t stream);

// Deciding takes three launches: guess(), read(), finish(). Then emit().
struct DecideArgs {
  SolveArgs solve;
  Aside aside;
  Word* heads;         // [layers, kHead] room for what the deciding read summed above its windows
  int32_t* bad;        // one word
  int64_t* quota;      // [modules] out: ties kept
  double* thresholds;  // [modules] out, or null
};

// Guesses from a sample where each layer's cut is: windows and brackets. Clears the table and `bad`. Cooperative.
cudaError_t guess(const DecideArgs& args, cudaStream_t stream);

struct ReadArgs {
  Plan plan;
  const LayerState* layers;
  Word* table;
  Aside aside;
  int32_t bins;
  int32_t* bad;
};
// Reads every weight once: surveys through the windows, sets aside what lies in the brackets that hold, and, where
// there are masks, writes those of their layers but for what is set aside.
cudaError_t read(const ReadArgs& args, bool masks, cudaStream_t stream);

// Solves and surveys in turns until every module is decided: cuts in solve.layers, quotas, thresholds. Layers whose
// bracket holds are surveyed by what was set aside, the others by their weights. Weights with an infinity or a NaN:
// `bad` is nonzero, thresholds are negative, nothing is decided. Cooperative.
cudaError_t finish(const DecideArgs& args, cudaStream_t stream);

// The stages as operators. *bad must be 0 before; kBadRows: windows, keep or cuts are not to be used, and what is
// written means nothing.

// Surveys through windows of any number of bins, most_bins of them at a time, into a zeroed table.
cudaError_t survey(const Plan& plan,
                   const int64_t* windows,  // [layers, kWindowRow]
                   LayerState* layers,      // [layers] room
                   Word* table,             // [layers, columns_of(bins)]
                   int bins, int32_t* bad, cudaStream_t stream);

// Cooperative.
cudaError_t solve(const RowArgs& args, int32_t* bad, cudaStream_t stream);

// cuts: [layers, 2]. Sets keep_from and tie.
cudaError_t take_cuts(const int64_t* cuts, LayerState* layers, int64_t count, int32_t* bad, cudaStream_t stream);

struct EmitArgs {
  Plan plan;                 // tensors' `out`: masks; for zeroing: null
  const LayerState* layers;  // keep_from, tie, bracket
  int64_t* quota;            // [modules] ties kept, counted down
  Aside aside;               // no slots: nothing was set aside
  int32_t *ties, *kept;      // [chunks] room for the ties of each chunk
  const int32_t* bad;        // nonzero: masks are all false, weights stay as they are
};

// Masks, or zeroes in place (`zero`): chunks that were set aside are put right, the others read, then ties shared out
// in order and settled. Four launches, or three.
cudaError_t emit(const EmitArgs& args, bool zero, cudaStream_t stream);

// Zeroes the weights whose mask byte (tensors' `out`) is 0.
cudaError_t apply(const Plan& plan, cudaStream_t stream);

// A tensor as [groups of m weights, inner apart]; pieces: of kGroupsInPiece groups.
struct GroupEntry {
  const void* data;
  void* out;  // mask bytes, or null
  int64_t groups, inner;
  int64_t first_piece;  // pieces of the tensors before it
  int32_t dtype, reserved;
};
constexpr int kGroupsInPiece = kThreads * 8;
struct GroupArgs {
  const GroupEntry* tensors;  // one more than there are, whose first_piece is `pieces`
  int32_t tensor_count, n, m;
  int64_t pieces;
  int32_t* bad;
};

// N:M masks, or weights zeroed in place (`zero`). Where a weight is not finite *bad becomes nonzero, masks are all
// false and weights stay as they are. Three launches.
cudaError_t nm(const GroupArgs& args, bool zero, cudaStream_t stream);

// Scores of layers of one 16-bit type, by histogram and table. Tensors' `out`: scores, float32.
struct TableArgs {
  Plan plan;  // of the layers [0, layer_count), each of one type, the same for all
  DType dtype;
  uint32_t* histogram;  // [layers, 2^15]
  float* table;         // [layers, 2^15]
  int32_t* bad;         // raised where a weight is not finite; must be 0 before
};
cudaError_t score_by_table(const TableArgs& args, cudaStream_t stream);

// Some neighbouring magnitudes of a layer, and where its weights are in the buffer.
struct Bucket {
  Word begin, end;       // in `keys` and `places`; while it is filled, `end` is where the next weight goes
  double above;          // energy of the weights above it
  uint32_t first, last;  // keys
  int32_t layer, reserved;
};

// Scores of layers of any type and length by buckets (buckets.cu). In the plan each layer is a module of its own, and
// its tensors stand together. Tensors' `out`: scores, float32.
struct BucketArgs {
  Plan plan;
  LayerState* layers;       // [layers] room for windows
  Word* table;              // [layers, kHead + 3 * kBucketBins] room
  const int64_t* starts;    // [layers] weights of the layers before
  uint16_t* bucket_of;      // [layers, kBucketBins + 2] room
  Bucket* buckets;          // [layers, kMostBuckets] room
  uint32_t* list;           // [1 + layers * kMostBuckets] room for those that there are
  uint32_t *keys, *places;  // [weights] room
  int32_t* bad;             // raised where a weight is not finite; must be 0 before
};
cudaError_t score_by_buckets(const BucketArgs& args, cudaStream_t stream);
// ... its last two launches, where the buckets are filled (sorted.cu).
cudaError_t score_buckets(const BucketArgs& args, cudaStream_t stream);
constexpr int64_t kMostPlaces = int64_t{1} << 33;  // chunks of a layer, times weights of a chunk

// Scores of layers of at most kBucketSize weights.
cudaError_t score_small(const Plan& plan, int32_t* bad, cudaStream_t stream);

// Fills the tensors' `out` with NaN where *bad is nonzero.
cudaError_t spoil(const Plan& plan, const int32_t* bad, cudaStream_t stream);

}  // namespace dimap::cuda
