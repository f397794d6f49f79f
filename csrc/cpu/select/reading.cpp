#include "cpu/select/reading.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <tuple>
#include <utility>

#include "cpu/select/closer_look.h"
#include "cpu/select/survey.h"

namespace dimap::cpu {
namespace {

// Masks of this many weights and more do not stay in the caches: they are written past them.
constexpr int64_t kStreamFrom = int64_t{1} << 23;

// Of more magnitudes in a bracket than this the weights are not counted: most counts would be 0.
constexpr int64_t kMagnitudesMost = 1024;

// Nor, where positions are kept too, of more than one for so many weights of a chunk.
constexpr int64_t kWeightsPerCount = 64;

// Sums the weights beyond a grid, on grids of their own: one more pass each over weights that are in the cache.
void climb(DecideFn decide, const void* weights, int64_t n, std::span<const uint32_t> ladder, ExponentSums& sums) {
  for (const uint32_t rung : ladder) {
    const Decided out = decide_from(decide, weights, n, {rung, rung});
    sums.add(static_cast<int>(Grid(rung).exponent) - 1, out.grid_sum());
  }
}

}  // namespace

Reading::Reading(const Problem& problem, Loader& loader, const Pool& pool, Keeps keeps)
    : chunks(chunks_of(problem)),
      guesses(problem.layers()),
      layers(problem.layers()),
      problem_(problem),
      loader_(loader),
      pool_(pool),
      keeps_(keeps),
      chunks_of_layer_(problem.layers()) {
  aside_.resize(static_cast<size_t>(pool.workers()));
  for (size_t c = 0; c < chunks.size(); ++c)
    if (chunks[c].mine) chunks_of_layer_[chunks[c].layer].push_back(static_cast<int32_t>(c));
  for (const Chunk& chunk : chunks)  // several ranks must have the same brackets
    guesses[chunk.layer].close = problem.ranks == 1 && chunk.n == problem.layer_total[chunk.layer];
}

bool Reading::counts(int32_t layer, DType dtype) const {
  return keeps_ == Keeps::kCounts && dtype != DType::kFloat32 &&
         Magnitudes(guesses[layer].bracket, dtype).count <= kMagnitudesMost;
}

bool Reading::counts(int32_t layer) const {  // float16 has the most magnitudes of the 16-bit types
  return problem_.layer_granularity[layer] > 0 && counts(layer, DType::kFloat16);
}

double Reading::expected(int32_t layer) const {
  double numbers = 0;
  const auto total = static_cast<double>(problem_.layer_total[layer]);
  for (const int32_t c : chunks_of_layer_[layer]) {
    const Chunk& chunk = chunks[c];
    const DType dtype = problem_.tensors[chunk.tensor].dtype;
    numbers += counts(layer, dtype) ? static_cast<double>(Magnitudes(guesses[layer].bracket, dtype).count)
                                    : guesses[layer].aside * static_cast<double>(chunk.n) / total;
  }
  return numbers;
}

bool Reading::read(std::span<const uint8_t> wanted, std::span<uint8_t* const> masks, int64_t budget) {
  const Kernels& kernel = kernels();
  const bool positions = keeps_ == Keeps::kPositions;
  bool all = true;
  int64_t bytes = 0;
  const auto size = [&](const Chunk& chunk) { return chunk.n * size_of(problem_.tensors[chunk.tensor].dtype); };
  for (size_t l = 0; l < layers.size(); ++l) {
    all &= wanted[l] != 0;
    if (!wanted[l]) continue;
    layers[l] = {};
    for (const int32_t c : chunks_of_layer_[l]) bytes += size(chunks[c]);
  }
  pool_.begin("reading", bytes);
  std::vector<ChunkAside> scratch(aside_.size());
  for (Aside& buffer : aside_) {
    if (all) buffer.numbers.used = buffer.positions.used = 0;
    // Room for all of the budget at once: growing would hold two copies, and memory that is not touched costs nothing.
    const int64_t most = budget + Chunk::kWeights + Decided::kSlack;
    buffer.numbers.room(most);
    if (positions) buffer.positions.room(most);
  }
  LayerLocks locks;
  std::vector<ExponentSums> outliers(aside_.size());
  std::atomic<int64_t> aside{0};
  std::atomic<bool> finite{true};
  int64_t total = 0;
  for (const TensorView& t : problem_.tensors) total += t.numel;
  pool_.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int worker) {
    Chunk& chunk = chunks[c];
    if (!chunk.mine || !wanted[chunk.layer] || !finite.load(std::memory_order_relaxed) ||
        aside.load(std::memory_order_relaxed) > budget)
      return;
    Aside& buffer = aside_[worker];
    uint32_t* numbers = buffer.numbers.room(std::max(chunk.n, kMagnitudesMost) + Decided::kSlack);
    uint16_t* places = positions ? buffer.positions.room(chunk.n + Decided::kSlack) : nullptr;
    const DType dtype = problem_.tensors[chunk.tensor].dtype;
    Guess& guess = guesses[chunk.layer];
    const DecideFn decide = kernel.decide[static_cast<int>(dtype)];
    const void* weights = loader_.load(chunk, worker);
    if (guess.look) look_closer(decide, weights, chunk.n, outliers[worker], guess);
    const auto& [bracket, ladder] = std::tie(guess.bracket, guess.ladder);
    const Magnitudes magnitudes(bracket, dtype);
    const bool alone = counts(chunk.layer, dtype);
    const bool counted = alone || (positions && magnitudes.shift && magnitudes.count <= chunk.n / kWeightsPerCount);
    Decided out;
    out.keys = counted ? scratch[worker].keys.get() : numbers;
    out.positions = counted || !positions ? scratch[worker].positions.get() : places;
    out.stream = total >= kStreamFrom;
    if (ladder.empty()) out.outliers = &outliers[worker];
    uint8_t* mask = masks.empty() ? nullptr : masks[chunk.tensor] + chunk.offset;
    Bracket here = bracket;
    if (alone) here.atom = Bracket::kNoAtom;  // it is counted like the others
    decide(weights, chunk.n, here, mask, out);
    climb(decide, weights, chunk.n, ladder, outliers[worker]);
    out.outliers = &outliers[worker];
    if (out.non_finite) finite.store(false, std::memory_order_relaxed);
    chunk.worker = worker;
    chunk.begin = buffer.numbers.used;
    chunk.place = buffer.positions.used;
    chunk.aside = out.aside;
    chunk.above = out.kept;
    chunk.counted = counted;
    if (counted) {
      std::fill_n(numbers, magnitudes.count, 0u);
      for (int64_t i = 0; i < out.aside; ++i) ++numbers[magnitudes.index(out.keys[i])];
      chunk.aside = magnitudes.count;
      if (positions) {  // in order of the magnitudes, and of position among equal ones
        std::array<uint32_t, Chunk::kWeights / kWeightsPerCount> next;
        std::exclusive_scan(numbers, numbers + chunk.aside, next.begin(), 0u);
        for (int64_t i = 0; i < out.aside; ++i) places[next[magnitudes.index(out.keys[i])]++] = out.positions[i];
      }
    }
    if (guess.look) guess.aside = static_cast<double>(out.aside);
    buffer.numbers.used += chunk.aside;
    if (positions) buffer.positions.used += out.aside;
    aside.fetch_add(alone ? chunk.aside : out.aside, std::memory_order_relaxed);
    pool_.advance(size(chunk));
    const std::lock_guard lock(locks.of(chunk.layer));
    layers[chunk.layer].add(out, bracket);
  });
  if (!finite) check_finite(problem_, loader_);
  return aside.load() <= budget;
}

LayerTable Reading::table(int32_t layer, Window window, std::span<Bin> bins) const {
  const Bracket& bracket = guesses[layer].bracket;
  std::fill(bins.begin(), bins.end(), Bin{});
  const uint64_t end = window.end(static_cast<int64_t>(bins.size()));
  LayerTable table;
  table.granularity = problem_.layer_granularity[layer];
  table.total = problem_.layer_total[layer];
  table.above = layers[layer].kept;
  table.above_energy = layers[layer].energy;
  table.look_through(window, std::min<uint64_t>(end, bracket.high), std::max(window.base, bracket.low));
  table.bins = bins;
  ExponentSums above;
  LayerSums sums;
  const Bracket inner{window.base, static_cast<uint32_t>(std::min<uint64_t>(end, kNonFinite)), Bracket::kNoAtom};
  const bool whole = inner.low <= bracket.low && inner.high >= bracket.high;
  // Bins of one magnitude each need no sums of their own.
  const bool counted_only = window.shift <= table.granularity;
  std::vector<uint32_t> inside;
  std::vector<uint16_t> positions;
  for (const int32_t c : chunks_of_layer_[layer]) {
    const Chunk& chunk = chunks[c];
    if (chunk.counted) {
      for_aside(chunk, [&](uint32_t magnitude, int64_t weights) {
        if (magnitude < window.base) return;
        if (magnitude >= end) {
          table.above += weights;
          above.add(scale(magnitude), static_cast<u128>(square(magnitude)) * static_cast<u128>(weights));
        } else {
          Bin& bin = bins[(magnitude - window.base) >> window.shift];
          counted_only ? void(bin.count += weights) : bin.add(magnitude, weights);
        }
      });
      continue;
    }
    const uint32_t* key = keys(chunk);
    int64_t n = chunk.aside;
    if (!whole) {  // keys are float32 magnitudes: the deciding loop sums those above and sets aside those inside
      inside.resize(static_cast<size_t>(n + Decided::kSlack));
      positions.resize(inside.size());
      Decided out;
      out.keys = inside.data(), out.positions = positions.data(), out.outliers = &above;
      kernels().decide[static_cast<int>(DType::kFloat32)](key, n, inner, nullptr, out);
      sums.add(out, inner);
      key = inside.data();
      n = out.aside;
    }
    const auto bin_of = [&](uint32_t k) -> Bin& {  // as `Magnitudes::index`
      return bins[std::min<size_t>((k - window.base) >> window.shift, bins.size() - 1)];
    };
    if (counted_only)
      for (int64_t i = 0; i < n; ++i) ++bin_of(key[i]).count;
    else
      for (int64_t i = 0; i < n; ++i) bin_of(key[i]).add(key[i]);
  }
  if (counted_only)
    for (size_t b = 0; b < bins.size(); ++b) {
      const int64_t n = std::exchange(bins[b].count, 0);
      if (n) bins[b].add(window.base + (static_cast<uint32_t>(b) << window.shift), n);
    }
  table.above += sums.kept;
  table.above_energy.add(sums.energy);
  if (bracket.atom != Bracket::kNoAtom && bracket.atom >= window.base && layers[layer].atoms) {
    const int64_t n = layers[layer].atoms;
    if (bracket.atom >= end) {
      table.above += n;
      above.add(scale(bracket.atom), static_cast<u128>(square(bracket.atom)) * static_cast<u128>(n));
    } else {
      bins[(bracket.atom - window.base) >> window.shift].add(bracket.atom, n);
    }
  }
  above.move_to(table.above_energy);
  return table;
}

}  // namespace dimap::cpu
