#include "cpu/select/survey.h"

#include <atomic>
#include <mutex>
#include <utility>

#include "cpu/select/chunks.h"
#include "cpu/select/reading.h"

namespace dimap::cpu {

void check_finite(const Problem& problem, Loader& loader) {
  for (const Chunk& chunk : chunks_of(problem)) {
    if (!chunk.mine) continue;
    const void* loaded = loader.load(chunk, 0);
    for_type(problem.tensors[chunk.tensor].dtype, [&]<DType kType>() {
      const auto* weights = static_cast<const storage_t<kType>*>(loaded);
      for (int64_t i = 0; i < chunk.n; ++i) {
        const uint32_t key = key_of<kType>(weights[i]);
        if (key < kNonFinite) continue;
        const char* name = non_finite_name(key, weights[i], sizeof weights[i]);
        throw NonFinite(chunk.tensor, chunk.offset + i, name);
      }
    });
  }
}

Survey survey(const Problem& problem, std::span<const Window> windows, int64_t bins, std::span<const uint8_t> wanted,
              Loader& loader, const Pool& pool) {
  Survey seen{std::vector<LayerTable>(problem.layers()), {}};
  std::vector<Bin*> bins_of(problem.layers());
  size_t count = 0;
  const auto is_wanted = [&](size_t l) { return wanted.empty() || wanted[l]; };
  for (size_t l = 0; l < problem.layers(); ++l) count += is_wanted(l);
  seen.bins.resize(count * static_cast<size_t>(bins));
  for (size_t l = 0, next = 0; l < problem.layers(); ++l)
    if (is_wanted(l)) bins_of[l] = seen.bins.data() + static_cast<size_t>(bins) * next++;
  std::vector<LayerSums> sums(problem.layers());
  LayerLocks locks;
  const auto workers = static_cast<size_t>(pool.workers());
  std::vector<ChunkAside> buffers(workers);
  std::vector<ExponentSums> outliers(workers);
  struct Own {  // a worker's bins of the layer that it is in
    int32_t layer = -1;
    std::vector<Bin> bins;
  };
  std::vector<Own> own(workers);
  const auto hand_over = [&](Own& mine) {
    if (mine.layer < 0) return;
    const std::lock_guard lock(locks.of(mine.layer));
    Bin* all = bins_of[mine.layer];
    for (int64_t b = 0; b < bins; ++b) {
      const Bin bin = std::exchange(mine.bins[b], {});
      all[b].count += bin.count, all[b].low += bin.low, all[b].high += bin.high;
    }
    mine.layer = -1;
  };
  std::atomic<bool> finite{true};
  const std::vector<Chunk> chunks = chunks_of(problem);
  const auto bytes = [&](const Chunk& chunk) { return chunk.n * size_of(problem.tensors[chunk.tensor].dtype); };
  int64_t all = 0;
  for (const Chunk& chunk : chunks)
    if (chunk.mine && is_wanted(chunk.layer)) all += bytes(chunk);
  pool.begin("surveying", all);
  pool.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int worker) {
    const Chunk& chunk = chunks[c];
    if (!chunk.mine || !is_wanted(chunk.layer)) return;
    const Window window = windows[chunk.layer];
    const auto end = static_cast<uint32_t>(std::min<uint64_t>(window.end(bins), kNonFinite));
    Decided out;
    out.keys = buffers[worker].keys.get(), out.positions = buffers[worker].positions.get(),
    out.outliers = &outliers[worker];
    const Bracket bracket{std::min(window.base, end), end, Bracket::kNoAtom};
    kernels().decide[static_cast<int>(problem.tensors[chunk.tensor].dtype)](loader.load(chunk, worker), chunk.n,
                                                                            bracket, nullptr, out);
    pool.advance(bytes(chunk));
    if (out.non_finite) finite.store(false, std::memory_order_relaxed);
    const auto add_to = [&](Bin* all) {
      for (int64_t i = 0; i < out.aside; ++i) {
        // Within the bins, even of weights that somebody changes while they are read.
        const int64_t bin = (out.keys[i] - window.base) >> window.shift;
        all[std::min(bin, bins - 1)].add(out.keys[i]);
      }
    };
    Own& mine = own[worker];
    if (mine.layer != chunk.layer) hand_over(mine);
    const bool many = out.aside > bins;
    if (many) {
      mine.layer = chunk.layer;
      mine.bins.resize(static_cast<size_t>(bins));
      add_to(mine.bins.data());
    }
    const std::lock_guard lock(locks.of(chunk.layer));
    sums[chunk.layer].add(out, bracket);
    if (!many) add_to(bins_of[chunk.layer]);
  });
  for (Own& mine : own) hand_over(mine);
  if (!finite) check_finite(problem, loader);
  for (size_t l = 0; l < problem.layers(); ++l) {
    LayerTable& table = seen.tables[l];
    table.look_through(windows[l], windows[l].end(bins), windows[l].base);
    table.granularity = problem.layer_granularity[l];
    table.total = problem.layer_total[l];
    table.above = sums[l].kept;
    table.above_energy = sums[l].energy;
    if (bins_of[l]) table.bins = std::span<const Bin>(bins_of[l], static_cast<size_t>(bins));
  }
  return seen;
}

}  // namespace dimap::cpu
