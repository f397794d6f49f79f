#include "engine.h"

#include <algorithm>
#include <numeric>

#include "reading.h"
#include "sample.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  int64_t bins = 1024;         // of a window over what was set aside
  int64_t survey_bins = 4096;  // of a window over all weights, at most
  int64_t survey_bytes = int64_t{8} << 20;  // all tables of a survey, about
  int64_t aside_share = 32;    // at most one weight in this many is set aside, and
  int64_t aside_least = 1 << 18;
} kTuning;

std::vector<std::vector<int32_t>> layers_of_modules(const Problem& problem) {
  std::vector<std::vector<int32_t>> layers(problem.modules());
  for (size_t l = 0; l < problem.layers(); ++l)
    layers[problem.layer_module[l]].push_back(static_cast<int32_t>(l));
  return layers;
}

// Solves one module from its layers' tables; writes its cuts or its next windows.
ModuleCut solve_module(const Problem& problem, int32_t module, std::span<const int32_t> layers,
                       std::span<const LayerTable> tables, int64_t bins, Cuts& cuts,
                       std::span<Window> windows) {
  std::vector<LayerTable> mine;
  std::vector<Cut> found(layers.size());
  std::vector<Window> next(layers.size());
  for (const int32_t l : layers) mine.push_back(tables[l]);
  const ModuleCut result = solve(mine, problem.keep[module], bins, found, next);
  for (size_t i = 0; i < layers.size(); ++i) {
    if (result.decided)
      cuts.layers[layers[i]] = found[i];
    else
      windows[layers[i]] = next[i];
  }
  return result;
}

// Decides the wanted modules by whole surveys, each closer than the one before.
void cut_by_surveys(const Problem& problem, std::vector<uint8_t> wanted, const Pool& pool, Cuts& cuts) {
  const auto layers = layers_of_modules(problem);
  const auto count = static_cast<int64_t>(problem.layers());
  int64_t bins = std::clamp(kTuning.survey_bytes / (static_cast<int64_t>(sizeof(Bin)) * std::max<int64_t>(count, 1)),
                            int64_t{kMinBins}, kTuning.survey_bins);
  std::vector<Window> windows;
  for (size_t l = 0; l < problem.layers(); ++l)
    windows.push_back(window_over(0, kNonFinite - 1, bins, problem.layer_granularity[l]));
  while (std::any_of(wanted.begin(), wanted.end(), [](uint8_t w) { return w != 0; })) {
    const Survey seen = survey(problem, windows, bins, wanted, pool);
    const std::vector<Window> before = windows;
    for (size_t m = 0; m < problem.modules(); ++m) {
      if (!wanted[m]) continue;
      cuts.modules[m] = solve_module(problem, static_cast<int32_t>(m), layers[m], seen.tables, bins, cuts, windows);
      wanted[m] = !cuts.modules[m].decided;
    }
    if (windows == before) bins *= 8;  // no window could close in: look through finer ones
  }
}

// Decides modules from what a reading set aside; returns those that it could not decide.
std::vector<uint8_t> cut_by_reading(const Problem& problem, const Reading& reading, std::vector<uint8_t> wanted,
                                    const Pool& pool, Cuts& cuts) {
  const auto layers = layers_of_modules(problem);
  const int64_t bins = kTuning.bins;
  std::vector<Window> windows(problem.layers());
  for (size_t l = 0; l < problem.layers(); ++l) {
    const Bracket& b = reading.brackets[l];
    windows[l] = window_over(b.low, std::max(b.low, b.high - 1), bins, problem.layer_granularity[l]);
  }
  std::vector<uint8_t> left(problem.modules());
  std::vector<Bin> storage(problem.layers() * static_cast<size_t>(bins));
  std::vector<LayerTable> tables(problem.layers());
  for (int round = 0; round < 6; ++round) {
    std::vector<int32_t> active;
    for (size_t l = 0; l < problem.layers(); ++l)
      if (wanted[problem.layer_module[l]]) active.push_back(static_cast<int32_t>(l));
    if (active.empty()) break;
    pool.for_each(static_cast<int64_t>(active.size()), [&](int64_t i, int) {
      const int32_t l = active[i];
      tables[l] = reading.table(l, windows[l], std::span(storage).subspan(static_cast<size_t>(l * bins),
                                                                         static_cast<size_t>(bins)));
    });
    pool.for_each(static_cast<int64_t>(problem.modules()), [&](int64_t m, int) {
      if (!wanted[m]) return;
      const ModuleCut result =
          solve_module(problem, static_cast<int32_t>(m), layers[m], tables, bins, cuts, windows);
      cuts.modules[m] = result;
      if (result.decided) wanted[m] = 0;
      if (result.escaped) wanted[m] = 0, left[m] = 1;
    });
  }
  for (size_t m = 0; m < left.size(); ++m) left[m] = left[m] || wanted[m];
  return left;
}

template <DType kType>
void mark_first(const void* data, int64_t n, uint32_t tie, int64_t quota, uint8_t* mask) {
  const auto* weights = static_cast<const storage_t<kType>*>(data);
  for (int64_t i = 0; i < n && quota > 0; ++i)
    if (key_of<kType>(weights[i]) == tie) mask[i] = 1, --quota;
}

template <DType kType>
void zero_after(void* data, int64_t n, uint32_t tie, int64_t quota) {
  auto* weights = static_cast<storage_t<kType>*>(data);
  for (int64_t i = 0; i < n; ++i)
    if (key_of<kType>(weights[i]) == tie && quota-- <= 0) weights[i] = 0;
}

// Shares each module's quota among the chunks, in order; chunk.ties must be known. A chunk whose ties are all kept or all
// dropped needs no further look at them: its cut says so.
void share_quota(std::span<Chunk> chunks, std::span<int64_t> quota) {
  for (Chunk& chunk : chunks) {
    if (chunk.ties == 0) continue;
    chunk.quota = std::min(chunk.ties, quota[chunk.module]);
    quota[chunk.module] -= chunk.quota;
  }
}

Cut cut_of(const Chunk& chunk, const Cut& layer) {
  if (layer.tie == Cut::kNoTie || chunk.ties == 0 || chunk.quota == 0) return {layer.keep_from, Cut::kNoTie};
  if (chunk.quota == chunk.ties) return {layer.tie, Cut::kNoTie};  // no weight lies between the two
  return layer;
}

// Fills chunk.ties where a layer has them: a read of those layers.
void count_ties(const Problem& problem, std::span<const Cut> cuts, std::span<Chunk> chunks, const Pool& pool) {
  pool.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int) {
    Chunk& chunk = chunks[c];
    const Cut& cut = cuts[chunk.layer];
    chunk.ties = chunk.quota = 0;
    if (cut.tie == Cut::kNoTie) return;
    uint32_t keys[Decided::kSlack], positions[Decided::kSlack];
    ExponentSums outliers;
    Decided out;
    out.keys = keys, out.positions = positions, out.outliers = &outliers;
    const Bracket bracket{kNonFinite, kNonFinite, cut.tie};
    kernels().decide[static_cast<int>(problem.tensors[chunk.tensor].dtype)](data(problem, chunk), chunk.n,
                                                                           bracket, nullptr, out);
    chunk.ties = out.atoms;
  });
}

void emit_chunks(const Problem& problem, std::span<const Cut> cuts, std::span<const Chunk> chunks,
                 std::span<const uint8_t> wanted, std::span<uint8_t* const> masks, const Pool& pool) {
  pool.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int) {
    const Chunk& chunk = chunks[c];
    if (!wanted[chunk.module]) return;
    const Cut cut = cut_of(chunk, cuts[chunk.layer]);
    const DType dtype = problem.tensors[chunk.tensor].dtype;
    uint32_t keys[Decided::kSlack], positions[Decided::kSlack];
    ExponentSums outliers;
    Decided out;
    out.keys = keys, out.positions = positions, out.outliers = &outliers;
    uint8_t* mask = masks[chunk.tensor] + chunk.offset;
    kernels().decide[static_cast<int>(dtype)](data(problem, chunk), chunk.n,
                                              {cut.keep_from, cut.keep_from, Bracket::kNoAtom}, mask, out);
    if (cut.tie == Cut::kNoTie) return;
    if (dtype == DType::kFloat32) mark_first<DType::kFloat32>(data(problem, chunk), chunk.n, cut.tie, chunk.quota, mask);
    if (dtype == DType::kBFloat16) mark_first<DType::kBFloat16>(data(problem, chunk), chunk.n, cut.tie, chunk.quota, mask);
    if (dtype == DType::kFloat16) mark_first<DType::kFloat16>(data(problem, chunk), chunk.n, cut.tie, chunk.quota, mask);
  });
}

// What a reading already decided needs only its set-aside weights marked. Modules that keep weights of which only the
// number is known (a layer's atom, zeros) are left for a second look: returned.
std::vector<uint8_t> mark_aside(const Problem& problem, Reading& reading, const Cuts& cuts,
                                std::span<const uint8_t> modules, std::span<int64_t> quota,
                                std::span<uint8_t* const> masks, const Pool& pool) {
  std::vector<uint8_t> again(problem.modules());
  for (size_t l = 0; l < problem.layers(); ++l) {
    const auto [low, high, atom] = reading.brackets[l];
    const Cut& cut = cuts.layers[l];
    const bool atom_kept = atom != Bracket::kNoAtom && reading.layers[l].atoms && (atom >= cut.keep_from || atom == cut.tie);
    const bool below_kept = cut.keep_from < low || cut.tie < low;  // zeros, when all else is kept
    if (atom_kept || below_kept) again[problem.layer_module[l]] = 1;
  }
  auto mine = [&](const Chunk& chunk) { return modules[chunk.module] && !again[chunk.module]; };
  pool.for_each(static_cast<int64_t>(reading.chunks.size()), [&](int64_t c, int) {
    Chunk& chunk = reading.chunks[c];
    if (!mine(chunk)) return;
    const Cut& cut = cuts.layers[chunk.layer];
    const uint32_t *keys = reading.keys(chunk), *positions = reading.positions(chunk);
    uint8_t* mask = masks[chunk.tensor] + chunk.offset;
    int64_t ties = 0;
    for (int64_t i = 0; i < chunk.aside; ++i) {
      if (keys[i] >= cut.keep_from) mask[positions[i]] = 1;
      ties += keys[i] == cut.tie;
    }
    chunk.ties = ties;
  });
  std::vector<Chunk*> tied;
  for (Chunk& chunk : reading.chunks)
    if (mine(chunk) && chunk.ties) tied.push_back(&chunk);
  for (Chunk* chunk : tied) {
    int64_t& left = quota[chunk->module];
    const uint32_t tie = cuts.layers[chunk->layer].tie;
    const uint32_t *keys = reading.keys(*chunk), *positions = reading.positions(*chunk);
    uint8_t* mask = masks[chunk->tensor] + chunk->offset;
    for (int64_t i = 0; i < chunk->aside && left > 0; ++i)
      if (keys[i] == tie) mask[positions[i]] = 1, --left;
  }
  for (size_t m = 0; m < again.size(); ++m) again[m] = again[m] && modules[m];
  return again;
}

void emit_modules(const Problem& problem, std::span<const Cut> cuts, std::span<const uint8_t> wanted,
                  std::span<int64_t> quota, std::span<uint8_t* const> masks, const Pool& pool) {
  std::vector<Chunk> chunks;
  for (const Chunk& chunk : chunks_of(problem))
    if (wanted[chunk.module]) chunks.push_back(chunk);
  count_ties(problem, cuts, chunks, pool);
  share_quota(chunks, quota);
  emit_chunks(problem, cuts, chunks, wanted, masks, pool);
}

bool any(std::span<const uint8_t> flags) {
  return std::any_of(flags.begin(), flags.end(), [](uint8_t f) { return f != 0; });
}

struct Outcome {
  Cuts cuts;
  std::vector<uint8_t> unwritten;  // [modules] whose masks are still to be written
};

// The common way of select, prune and cut: guess, read once, solve; whole surveys for the modules where the guess missed.
Outcome decide_all(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool) {
  Outcome outcome{{std::vector<Cut>(problem.layers()), std::vector<ModuleCut>(problem.modules())},
                  std::vector<uint8_t>(problem.modules(), 1)};
  Cuts& cuts = outcome.cuts;
  const int64_t total = std::accumulate(problem.module_total.begin(), problem.module_total.end(), int64_t{0});
  const int64_t budget = total / kTuning.aside_share + kTuning.aside_least;
  Guess guess = guess_brackets(problem, pool);
  double expected = 0;
  std::vector<uint8_t> wanted(problem.modules(), 1), left(problem.modules(), 1);
  for (size_t m = 0; m < problem.modules(); ++m) expected += guess.aside[m];
  // A module that keeps all has its threshold at its smallest weight, which no sample shows: whole surveys find it.
  for (size_t m = 0; m < problem.modules(); ++m)
    wanted[m] = problem.keep[m] < problem.module_total[m] || problem.module_total[m] == 0;
  Reading reading(problem, std::move(guess.brackets), pool);
  if (expected <= static_cast<double>(budget) && reading.read(wanted, masks, budget)) {
    left = cut_by_reading(problem, reading, wanted, pool, cuts);
    for (size_t m = 0; m < left.size(); ++m) left[m] = left[m] || !wanted[m];
    if (!masks.empty()) {
      std::vector<uint8_t> decided(left.size());
      for (size_t m = 0; m < left.size(); ++m) decided[m] = !left[m];
      std::vector<int64_t> quota;
      for (const ModuleCut& m : cuts.modules) quota.push_back(m.quota);
      outcome.unwritten = mark_aside(problem, reading, cuts, decided, quota, masks, pool);
    }
  }
  if (any(left)) {
    cut_by_surveys(problem, left, pool, cuts);
    for (size_t m = 0; m < left.size(); ++m) outcome.unwritten[m] |= left[m];
  }
  return outcome;
}

std::vector<int64_t> quotas(const Cuts& cuts) {
  std::vector<int64_t> quota;
  for (const ModuleCut& m : cuts.modules) quota.push_back(m.quota);
  return quota;
}

}  // namespace

Survey survey(const Problem& problem, std::span<const Window> windows, int64_t bins,
              std::span<const uint8_t> wanted, const Pool& pool) {
  Survey seen{std::vector<LayerTable>(problem.layers()),
              std::vector<Bin>(problem.layers() * static_cast<size_t>(bins))};
  std::vector<LayerSums> sums(problem.layers());
  std::vector<std::mutex> locks(64);
  const auto workers = static_cast<size_t>(pool.workers());
  std::vector<Aside> buffers(workers);
  std::vector<ExponentSums> outliers(workers);
  std::atomic<bool> finite{true};
  std::vector<Chunk> chunks = chunks_of(problem);
  pool.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int worker) {
    const Chunk& chunk = chunks[c];
    if (!wanted.empty() && !wanted[chunk.module]) return;
    const Window window = windows[chunk.layer];
    const uint64_t end = std::min<uint64_t>(window.end(bins), kNonFinite);
    Aside& buffer = buffers[worker];
    buffer.reserve(chunk.n + Decided::kSlack);
    Decided out;
    out.keys = buffer.keys(), out.positions = buffer.positions(), out.outliers = &outliers[worker];
    const Bracket bracket{window.base, static_cast<uint32_t>(end), Bracket::kNoAtom};
    kernels().decide[static_cast<int>(problem.tensors[chunk.tensor].dtype)](data(problem, chunk), chunk.n, bracket,
                                                                           nullptr, out);
    if (out.largest >= kNonFinite) finite.store(false, std::memory_order_relaxed);
    const std::lock_guard lock(locks[static_cast<size_t>(chunk.layer) % locks.size()]);
    LayerSums& layer = sums[chunk.layer];
    layer.kept += out.kept;
    if (const u128 sum = out.grid_sum()) layer.energy.add(sum, static_cast<int>(Grid(bracket.high).exponent) - 1);
    outliers[worker].move_to(layer.energy);
    Bin* bin = seen.bins.data() + chunk.layer * bins;
    for (int64_t i = 0; i < out.aside; ++i) bin[(out.keys[i] - window.base) >> window.shift].add(out.keys[i]);
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

void emit(const Problem& problem, std::span<const Cut> cuts, std::span<int64_t> quota,
          std::span<uint8_t* const> masks, const Pool& pool) {
  const std::vector<uint8_t> all(problem.modules(), 1);
  emit_modules(problem, cuts, all, quota, masks, pool);
}

Cuts cut(const Problem& problem, const Pool& pool) { return decide_all(problem, {}, pool).cuts; }

Cuts select(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool) {
  Outcome outcome = decide_all(problem, masks, pool);
  if (any(outcome.unwritten)) {
    std::vector<int64_t> quota = quotas(outcome.cuts);
    emit_modules(problem, outcome.cuts.layers, outcome.unwritten, quota, masks, pool);
  }
  return std::move(outcome.cuts);
}

Cuts prune(const Problem& problem, const Pool& pool) {
  Cuts cuts = decide_all(problem, {}, pool).cuts;
  std::vector<Chunk> chunks = chunks_of(problem);
  count_ties(problem, cuts.layers, chunks, pool);
  std::vector<int64_t> quota = quotas(cuts);
  share_quota(chunks, quota);
  pool.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int) {
    const Chunk& chunk = chunks[c];
    const Cut cut = cut_of(chunk, cuts.layers[chunk.layer]);
    const DType dtype = problem.tensors[chunk.tensor].dtype;
    void* weights = const_cast<void*>(data(problem, chunk));
    kernels().zero[static_cast<int>(dtype)](weights, chunk.n, cut.keep_from, cut.tie);
    if (cut.tie == Cut::kNoTie) return;
    if (dtype == DType::kFloat32) zero_after<DType::kFloat32>(weights, chunk.n, cut.tie, chunk.quota);
    if (dtype == DType::kBFloat16) zero_after<DType::kBFloat16>(weights, chunk.n, cut.tie, chunk.quota);
    if (dtype == DType::kFloat16) zero_after<DType::kFloat16>(weights, chunk.n, cut.tie, chunk.quota);
  });
  return cuts;
}

}  // namespace dimap::cpu
