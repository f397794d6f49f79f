#include "cpu/select/emit.h"

#include <iterator>
#include <vector>

#include "cpu/select/reading.h"

namespace dimap::cpu {
namespace {

Decided run(const Problem& problem, const Chunk& chunk, const Bracket& bracket, uint8_t* mask) {
  const DType dtype = problem.tensors[chunk.tensor].dtype;
  return decide_from(kernels().decide[static_cast<int>(dtype)], data(problem, chunk), chunk.n, bracket, mask);
}

// The cut of one chunk. Where its ties are all kept or all dropped nobody need look at them again.
Cut cut_of(const Chunk& chunk, const Cut& layer) {
  if (layer.tie == Cut::kNoTie || chunk.ties == 0 || chunk.quota == 0) return {layer.keep_from, Cut::kNoTie};
  if (chunk.quota == chunk.ties) return {layer.tie, Cut::kNoTie};  // no weight lies between the two
  return layer;
}

class Emitter {
 public:
  Emitter(const Problem& problem, std::span<const Cut> cuts, Reading* reading, std::span<const uint8_t> read,
          const Pool& pool)
      : problem_(problem), cuts_(cuts), reading_(reading), read_(read), pool_(pool) {
    if (reading == nullptr) own_ = chunks_of(problem);
  }

  std::span<Chunk> chunks() { return reading_ ? std::span<Chunk>(reading_->chunks) : own_; }

  // Whether all that a chunk still needs is among what the reading set aside.
  bool known(const Chunk& chunk) const { return reading_ && read_[chunk.layer]; }

  template <typename Body>
  void for_chunks(Body&& body) {
    const std::span<Chunk> all = chunks();
    pool_.for_each(static_cast<int64_t>(all.size()), [&](int64_t c, int) { body(all[c], cuts_[all[c].layer]); });
  }

  // Shares each module's quota among the chunks, in order of position: the first ties are kept.
  void share(std::span<int64_t> quota) {
    bool any = false;
    for (const Cut& cut : cuts_) any |= cut.tie != Cut::kNoTie;
    if (!any) return;
    for_chunks([&](Chunk& chunk, const Cut& cut) {
      chunk.ties = chunk.quota = 0;
      if (cut.tie == Cut::kNoTie) return;
      if (known(chunk)) {
        reading_->for_aside(chunk, [&](uint32_t key, int64_t n) { chunk.ties += key == cut.tie ? n : 0; });
      } else {
        chunk.ties = run(problem_, chunk, {kNonFinite, kNonFinite, cut.tie}, nullptr).atoms;
      }
    });
    for (Chunk& chunk : chunks()) {
      chunk.quota = std::min(chunk.ties, quota[chunk.module]);
      quota[chunk.module] -= chunk.quota;
    }
  }

  // The reading has marked what lies above the bracket, and from its guess on; puts right what was guessed wrong.
  void mark_aside(const Chunk& chunk, const Cut& cut, uint8_t* mask) const {
    const uint32_t* keys = reading_->keys(chunk);
    const uint16_t* positions = reading_->positions(chunk);
    const uint32_t from = cut_of(chunk, cut).keep_from, guess = reading_->guesses[chunk.layer].bracket.guess;
    const uint32_t first = std::min(from, guess), wrong = std::max(from, guess) - first;
    const uint8_t kept = from < guess;
    const bool some_ties = chunk.quota != 0 && chunk.quota != chunk.ties;
    int64_t left = chunk.quota;
    if (chunk.counted) {
      reading_->for_aside(chunk, [&](uint32_t key, int64_t n) {
        const std::span here(positions, static_cast<size_t>(n));
        positions += n;
        if (key - first < wrong)
          for (const uint16_t at : here) mask[at] = kept;
        if (some_ties && key == cut.tie)
          for (const uint16_t at : here) mask[at] = left-- > 0;
      });
      return;
    }
    uint16_t list[256];  // where: gathered without branches, since nothing foretells which were guessed wrong
    int64_t n = 0;
    const auto put_right = [&] {
      for (int64_t i = 0; i < n; ++i) mask[list[i]] = kept;
      n = 0;
    };
    for (int64_t i = 0; i < chunk.aside; ++i) {
      list[n] = positions[i];
      n += keys[i] - first < wrong;
      if (n == std::ssize(list)) [[unlikely]]
        put_right();
    }
    put_right();
    if (!some_ties) return;
    for (int64_t i = 0; i < chunk.aside; ++i)
      if (keys[i] == cut.tie) mask[positions[i]] = left-- > 0;
  }

  void write_mask(const Chunk& chunk, const Cut& layer, uint8_t* mask) const {
    const Cut cut = cut_of(chunk, layer);
    // As a guess, not as the bracket's high end: what is kept is not summed again.
    run(problem_, chunk, {kKeyEnd, kKeyEnd, Bracket::kNoAtom, cut.keep_from}, mask);
    if (cut.tie == Cut::kNoTie) return;
    for_type(problem_.tensors[chunk.tensor].dtype, [&]<DType kType>() {
      const auto* weights = static_cast<const storage_t<kType>*>(data(problem_, chunk));
      int64_t left = chunk.quota;
      for (int64_t i = 0; left > 0 && i < chunk.n; ++i)
        if (key_of<kType>(weights[i]) == cut.tie) mask[i] = 1, --left;
    });
  }

  void write_zeros(const Chunk& chunk, const Cut& layer) const {
    const Cut cut = cut_of(chunk, layer);
    const DType dtype = problem_.tensors[chunk.tensor].dtype;
    kernels().zero[static_cast<int>(dtype)](data(problem_, chunk), chunk.n, cut.keep_from, cut.tie);
    if (cut.tie == Cut::kNoTie) return;
    for_type(dtype, [&]<DType kType>() {
      auto* weights = static_cast<storage_t<kType>*>(data(problem_, chunk));
      int64_t left = chunk.quota;
      for (int64_t i = 0; i < chunk.n; ++i)
        if (key_of<kType>(weights[i]) == cut.tie && left-- <= 0) weights[i] = 0;
    });
  }

 private:
  const Problem& problem_;
  std::span<const Cut> cuts_;
  Reading* reading_;
  std::span<const uint8_t> read_;
  const Pool& pool_;
  std::vector<Chunk> own_;
};

}  // namespace

void emit(const Problem& problem, std::span<const Cut> cuts, std::span<int64_t> quota, std::span<uint8_t* const> masks,
          Reading* reading, std::span<const uint8_t> read, const Pool& pool) {
  Emitter emitter(problem, cuts, reading, read, pool);
  emitter.share(quota);
  emitter.for_chunks([&](const Chunk& chunk, const Cut& cut) {
    uint8_t* mask = masks[chunk.tensor] + chunk.offset;
    if (emitter.known(chunk))
      emitter.mark_aside(chunk, cut, mask);
    else
      emitter.write_mask(chunk, cut, mask);
  });
}

void zero(const Problem& problem, std::span<const Cut> cuts, std::span<int64_t> quota, Reading* reading,
          std::span<const uint8_t> read, const Pool& pool) {
  Emitter emitter(problem, cuts, reading, read, pool);
  emitter.share(quota);
  // From the end: what was read last may still be in the cache.
  const std::span<Chunk> chunks = emitter.chunks();
  const auto n = static_cast<int64_t>(chunks.size());
  pool.for_each(n, [&](int64_t c, int) {
    const Chunk& chunk = chunks[static_cast<size_t>(n - 1 - c)];
    emitter.write_zeros(chunk, cuts[chunk.layer]);
  });
}

}  // namespace dimap::cpu
