#include "survey.h"

#include <atomic>
#include <mutex>

#include "chunks.h"
#include "reading.h"

namespace dimap::cpu {

void check_finite(const Problem& problem) {
  for (size_t t = 0; t < problem.tensors.size(); ++t) {
    const TensorView& tensor = problem.tensors[t];
    for_type(tensor.dtype, [&]<DType kType>() {
      const auto* weights = static_cast<const storage_t<kType>*>(tensor.data);
      for (int64_t i = 0; i < tensor.numel; ++i) {
        const uint32_t key = key_of<kType>(weights[i]);
        if (key >= kNonFinite) throw NonFinite(static_cast<int64_t>(t), i, key > kNonFinite);
      }
    });
  }
}

Survey survey(const Problem& problem, std::span<const Window> windows, int64_t bins, std::span<const uint8_t> wanted,
              const Pool& pool) {
  Survey seen{std::vector<LayerTable>(problem.layers()),
              std::vector<Bin>(problem.layers() * static_cast<size_t>(bins))};
  std::vector<LayerSums> sums(problem.layers());
  LayerLocks locks;
  const auto workers = static_cast<size_t>(pool.workers());
  std::vector<Aside> buffers(workers);
  std::vector<ExponentSums> outliers(workers);
  std::atomic<bool> finite{true};
  const std::vector<Chunk> chunks = chunks_of(problem);
  pool.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int worker) {
    const Chunk& chunk = chunks[c];
    if (!wanted.empty() && !wanted[chunk.layer]) return;
    const Window window = windows[chunk.layer];
    const auto end = static_cast<uint32_t>(std::min<uint64_t>(window.end(bins), kNonFinite));
    Aside& buffer = buffers[worker];
    buffer.reserve(chunk.n + Decided::kSlack);
    Decided out;
    out.keys = buffer.keys(), out.positions = buffer.positions(), out.outliers = &outliers[worker];
    const Bracket bracket{window.base, end, Bracket::kNoAtom};
    kernels().decide[static_cast<int>(problem.tensors[chunk.tensor].dtype)](data(problem, chunk), chunk.n, bracket,
                                                                            nullptr, out);
    if (out.largest >= kNonFinite) finite.store(false, std::memory_order_relaxed);
    const std::lock_guard lock(locks.of(chunk.layer));
    sums[chunk.layer].add(out, bracket);
    Bin* bin = seen.bins.data() + chunk.layer * bins;
    for (int64_t i = 0; i < out.aside; ++i)
      if (out.keys[i] < end) bin[(out.keys[i] - window.base) >> window.shift].add(out.keys[i]);
  });
  if (!finite) check_finite(problem);
  for (size_t l = 0; l < problem.layers(); ++l) {
    LayerTable& table = seen.tables[l];
    table.look_through(windows[l], windows[l].end(bins), windows[l].base);
    table.granularity = problem.layer_granularity[l];
    table.total = problem.layer_total[l];
    table.above = sums[l].kept;
    table.above_energy = sums[l].energy;
    table.bins = std::span<const Bin>(seen.bins).subspan(l * static_cast<size_t>(bins), static_cast<size_t>(bins));
  }
  return seen;
}

}  // namespace dimap::cpu
