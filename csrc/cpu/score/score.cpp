#include "cpu/score/score.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cpu/large_pages.h"
#include "cpu/score/score_layer.h"
#include "cpu/select/survey.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_score.py.
constexpr struct {
  int64_t shared = int64_t{1} << 23;  // layers of this many weights and more are worked on by all workers together
  int64_t sorted = int64_t{1} << 16;  // layers of up to this many weights are sorted
  int64_t piece = int64_t{1} << 16;   // weights in one task of a layer
} kTuning;

class Alone final : public Pool {
 public:
  int workers() const override { return 1; }
  void run(const std::function<void(int)>& body) const override { body(0); }
};

std::vector<Piece> pieces_of(const Problem& problem, std::span<float* const> scores, std::span<const int32_t> tensors) {
  std::vector<Piece> pieces;
  int64_t start = 0;
  for (const int32_t t : tensors) {
    const TensorView& tensor = problem.tensors[t];
    for (int64_t at = 0; at < tensor.numel; at += kTuning.piece) {
      const int64_t n = std::min(kTuning.piece, tensor.numel - at);
      pieces.push_back({&tensor, scores[t], at, n, start + at});
    }
    start += tensor.numel;
  }
  return pieces;
}

// memory: of the pool's workers.
void score_layer(const Problem& problem, std::span<float* const> scores, std::span<const int32_t> tensors,
                 const Pool& pool, std::span<ScoreMemory> memory) {
  const std::vector<Piece> pieces = pieces_of(problem, scores, tensors);
  if (pieces.empty()) return;
  const DType dtype = pieces[0].tensor->dtype;
  const bool same = std::all_of(pieces.begin(), pieces.end(), [&](const Piece& p) { return p.tensor->dtype == dtype; });
  const int64_t total = pieces.back().start + pieces.back().n;
  if (same && dtype != DType::kFloat32)
    score_by_table(dtype, pieces, pool);
  else if (total <= kTuning.sorted)
    score_by_sort(pieces, total, memory[0]);
  else
    score_by_buckets(pieces, total >= kTuning.shared, pool, memory);
}

}  // namespace

void score(const Problem& problem, std::span<float* const> scores, const Pool& pool) {
  advise_outputs(problem, scores);
  std::vector<std::vector<int32_t>> tensors(problem.layers());
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    tensors[problem.tensors[t].layer].push_back(static_cast<int32_t>(t));
  std::vector<int32_t> order(problem.layers());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return problem.layer_total[a] > problem.layer_total[b]; });
  std::vector<ScoreMemory> memory(static_cast<size_t>(pool.workers()));
  try {
    size_t first = 0;
    for (; first < order.size() && problem.layer_total[order[first]] >= kTuning.shared; ++first)
      score_layer(problem, scores, tensors[order[first]], pool, memory);
    pool.for_each(static_cast<int64_t>(order.size() - first), [&](int64_t i, int worker) {
      score_layer(problem, scores, tensors[order[first + static_cast<size_t>(i)]], Alone(),
                  std::span(memory).subspan(static_cast<size_t>(worker), 1));
    });
  } catch (const FoundNonFinite&) {
    Loader loader(problem, 1);
    check_finite(problem, loader);
    throw std::logic_error("a non-finite weight vanished while it was looked at");
  }
}

}  // namespace dimap::cpu
