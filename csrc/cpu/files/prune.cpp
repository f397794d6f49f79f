#include "cpu/files/prune.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>

#include "cpu/files/elements.h"
#include "cpu/nm.h"
#include "cpu/sparse/pack.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kBytes = int64_t{1} << 21;  // read and written at a time, about: fits a processor's cache
constexpr int64_t kRest = int64_t{1} << 20;   // of what is no weight

// Calls body.template operator()<T>() with the integer that holds a weight's bits.
template <typename Body>
void for_storage(DType dtype, Body&& body) {
  if (dtype == DType::kFloat32)
    body.template operator()<uint32_t>();
  else
    body.template operator()<uint16_t>();
}

}  // namespace

// Neighbouring bytes of a file that one loop works on: a chunk of weights, or a part of some elements.
struct FilePruning::Segment {
  int32_t file;
  int64_t begin, bytes;
  int64_t place;      // in the target; of a packed chunk that of its values
  int32_t chunk;      // -1: none,
  int32_t rest = -1;  // but a part of these elements
};

// What one worker needs and counts.
struct FilePruning::Worker {
  explicit Worker(const Problem& problem, size_t rest)
      : written{std::vector<int64_t>(rest), std::vector<int64_t>(problem.tensors.size()),
                std::vector<uint32_t>(problem.tensors.size(), kKeyEnd), std::vector<char>(rest)} {}
  Buffer bytes, aligned, mask, bits, values;
  Written written;
};

FilePruning::FilePruning(const Problem& problem, const Pool& pool, const Exchange* exchange, int64_t aside_most)
    : problem_(problem),
      pool_(pool),
      exchange_(exchange),
      loader_(problem, pool.workers()),
      kept_(problem.tensors.size()) {
  if (problem.patterns.empty()) {
    decision_.emplace(problem, pool, exchange, Keeps::kCounts, std::span<uint8_t* const>{}, aside_most);
    share_ties();
  } else {
    groups_ = chunks_of(problem);
    for (const Chunk& c : groups_) {
      const Pattern& pattern = problem.patterns[c.tensor];
      most_ = std::max(most_, c.n);
      chunk_kept_.push_back(c.mine ? c.n / pattern.m * pattern.n : 0);
    }
  }
  for (size_t c = 0; c < chunk_kept_.size(); ++c) kept_[chunks()[c].tensor] += chunk_kept_[c];
  sum(kept_);
}

bool FilePruning::keeps_zeros(const Chunk& chunk) const {
  if (!decision_) return true;
  const Cut& cut = decision_->cuts[chunk.layer];
  return cut.keep_from == 0 || cut.tie == 0;
}

// Counts what each chunk keeps, and shares each module's quota among the tied weights in order of position.
void FilePruning::share_ties() {
  Reading& reading = decision_->reading();
  std::vector<Chunk>& chunks = reading.chunks;
  chunk_kept_.assign(chunks.size(), 0);
  int64_t bytes = 0;
  for (const Chunk& c : chunks)
    if (c.mine && !known(c)) bytes += c.n * size_of(problem_.tensors[c.tensor].dtype);
  if (bytes) pool_.begin("counting", bytes);
  std::vector<int64_t> ties(chunks.size());
  pool_.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int worker) {
    const Chunk& chunk = chunks[c];
    if (!chunk.mine) return;
    const Cut& cut = decision_->cuts[chunk.layer];
    int64_t kept = 0, tied = 0;
    if (known(chunk)) {
      kept = chunk.above;
      reading.for_aside(chunk, [&](uint32_t key, int64_t weights) {
        if (key >= cut.keep_from) kept += weights;
        if (key == cut.tie) tied += weights;
      });
    } else {
      const DType dtype = problem_.tensors[chunk.tensor].dtype;
      const void* loaded = loader_.load(chunk, worker);
      for_type(dtype, [&]<DType kType>() {
        const auto* weights = static_cast<const storage_t<kType>*>(loaded);
        for (int64_t i = 0; i < chunk.n; ++i) {
          const uint32_t key = key_of<kType>(weights[i]);
          kept += key >= cut.keep_from;
          tied += key == cut.tie;
        }
      });
      pool_.advance(chunk.n * size_of(dtype));
    }
    chunk_kept_[c] = kept;
    ties[c] = tied;
  });
  if (std::any_of(decision_->cuts.begin(), decision_->cuts.end(), [](const Cut& c) { return c.tie != Cut::kNoTie; }))
    sum(ties);
  std::vector<int64_t> quota = decision_->quotas();
  for (size_t c = 0; c < chunks.size(); ++c) {
    Chunk& chunk = chunks[c];
    chunk.ties = ties[c];
    chunk.quota = std::min(chunk.ties, quota[chunk.module]);
    quota[chunk.module] -= chunk.quota;
    if (chunk.mine) chunk_kept_[c] += chunk.quota;
  }
}

// What a layer's cut keeps of a chunk, a byte a weight.
void FilePruning::mark_by_cut(const Chunk& chunk, const void* weights, uint8_t* mask) const {
  const DType dtype = problem_.tensors[chunk.tensor].dtype;
  Cut cut = decision_->cuts[chunk.layer];
  if (cut.tie != Cut::kNoTie && chunk.quota == chunk.ties && chunk.ties > 0) cut.keep_from = cut.tie;
  // As a guess, not as the bracket's high end: what is kept need not be summed.
  const Bracket bracket{kKeyEnd, kKeyEnd, Bracket::kNoAtom, cut.keep_from};
  decide_from(kernels().decide[static_cast<int>(dtype)], weights, chunk.n, bracket, mask);
  int64_t left = cut.keep_from > cut.tie ? chunk.quota : 0;
  for_type(dtype, [&]<DType kType>() {
    auto* w = static_cast<const storage_t<kType>*>(weights);
    for (int64_t i = 0; left > 0 && i < chunk.n; ++i)
      if (key_of<kType>(w[i]) == cut.tie) mask[i] = 1, --left;
  });
}

// Zeroes what a chunk does not keep. The worker's mask says afterwards what it keeps, a byte a weight.
void FilePruning::prune_chunk(int number, Worker& worker, const Chunk& chunk, void* weights) {
  const TensorView& tensor = problem_.tensors[chunk.tensor];
  const void* ranked = loader_.ranked(tensor, weights, chunk.offset, chunk.n, number);
  auto* mask = reinterpret_cast<uint8_t*>(worker.mask.room(most_));
  if (decision_) {
    mark_by_cut(chunk, ranked, mask);
  } else {
    const auto [n, m, inner] = problem_.patterns[chunk.tensor];
    mark_largest({const_cast<void*>(ranked), mask, chunk.n / (m * inner), inner, tensor.dtype}, n, m, chunk.tensor,
                 chunk.offset);
  }
  int64_t kept = 0;
  uint32_t smallest = kKeyEnd;
  const bool look = worker.written.smallest[chunk.tensor] != 0;
  for_type(tensor.stored, [&]<DType kType>() {
    auto* w = static_cast<storage_t<kType>*>(weights);
    for (int64_t i = 0; i < chunk.n; ++i) {
      kept += mask[i];
      w[i] = static_cast<storage_t<kType>>(w[i] & -static_cast<int>(mask[i]));
    }
    if (look) {
      for (int64_t i = 0; i < chunk.n; ++i) {
        const uint32_t key = mask[i] ? key_of<kType>(w[i]) : kKeyEnd;
        smallest = key < smallest ? key : smallest;
      }
    }
    int64_t nonzero = kept;
    if (keeps_zeros(chunk)) {
      nonzero = 0;
      for (int64_t i = 0; i < chunk.n; ++i) nonzero += key_of<kType>(w[i]) != 0;
    }
    worker.written.nonzero[chunk.tensor] += nonzero;
  });
  uint32_t& known_smallest = worker.written.smallest[chunk.tensor];
  known_smallest = std::min(known_smallest, smallest);
  if (kept != chunk_kept_[static_cast<size_t>(&chunk - chunks().data())]) throw Changed(chunk.tensor);
}

std::vector<int64_t> FilePruning::count_packed() {
  const std::vector<Chunk>& chunks = this->chunks();
  std::vector<int64_t> packed(problem_.tensors.size());
  chunk_packed_ = chunk_kept_;
  std::deque<Worker> workers;
  for (int w = 0; w < pool_.workers(); ++w) workers.emplace_back(problem_, 0);
  pool_.for_each(static_cast<int64_t>(chunks.size()), [&](int64_t c, int w) {
    const Chunk& chunk = chunks[c];
    if (!chunk.mine || !keeps_zeros(chunk)) return;
    const TensorView& tensor = problem_.tensors[chunk.tensor];
    const int64_t size = size_of(tensor.stored), bytes = chunk.n * size;
    char* weights = workers[w].aligned.room(bytes);
    read_fully(problem_.files[tensor.file], weights, bytes, tensor.offset + chunk.offset * size);
    prune_chunk(w, workers[w], chunk, weights);
    chunk_packed_[c] = count_set(weights, chunk.n, size, ~uint64_t{0});
  });
  sum(chunk_packed_);
  for (size_t c = 0; c < chunks.size(); ++c) packed[chunks[c].tensor] += chunk_packed_[c];
  return packed;
}

FilePruning::Written FilePruning::write(const Sink& sink, std::span<const Place> places, std::span<const Elements> rest,
                                        const std::optional<MaskFile>& masks) {
  const std::vector<Chunk>& chunks = this->chunks();
  const Shares shares(problem_);
  std::vector<Segment> segments;
  std::vector<int64_t> used(problem_.tensors.size());  // values of the chunks before, in a packed tensor
  for (size_t c = 0; c < chunks.size(); ++c) {
    const Chunk& chunk = chunks[c];
    const TensorView& tensor = problem_.tensors[chunk.tensor];
    const int64_t size = size_of(tensor.stored), begin = chunk.offset * size;
    const Place& place = places[chunk.tensor];
    int64_t at = place.values + begin;
    if (place.bits >= 0) {
      at = place.values + used[chunk.tensor] * size;
      used[chunk.tensor] += chunk_packed_.at(c);
    }
    if (chunk.mine)
      segments.push_back({tensor.file, tensor.offset + begin, chunk.n * size, at, static_cast<int32_t>(c)});
  }
  for (size_t r = 0; r < rest.size(); ++r) {
    const Elements& e = rest[r];
    const int64_t bytes = e.count * e.size, step = kRest / e.size * e.size;
    for (int64_t at = 0; at < bytes; at += step)
      if (problem_.ranks == 1 || shares.rank_of(e.file, e.offset + at) == problem_.rank)
        segments.push_back(
            {e.file, e.offset + at, std::min(step, bytes - at), e.place + at, -1, static_cast<int32_t>(r)});
  }
  std::sort(segments.begin(), segments.end(),
            [](const Segment& a, const Segment& b) { return std::pair(a.file, a.begin) < std::pair(b.file, b.begin); });
  // Pieces: neighbouring segments, read together.
  std::vector<size_t> pieces{0};
  int64_t bytes = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const Segment &first = segments[pieces.back()], &here = segments[s];
    const bool next =
        s > 0 && segments[s - 1].file == here.file && segments[s - 1].begin + segments[s - 1].bytes == here.begin;
    if (s > 0 && (!next || here.begin + here.bytes - first.begin > kBytes)) pieces.push_back(s);
    bytes += here.bytes;
  }
  pieces.push_back(segments.size());
  pool_.begin("writing", bytes);
  std::deque<Worker> workers;
  for (int w = 0; w < pool_.workers(); ++w) workers.emplace_back(problem_, rest.size());
  // Of most tensors the smallest kept weight is among what was set aside; the others are looked at in writing.
  std::vector<uint32_t> smallest(problem_.tensors.size(), kKeyEnd);
  for (const Chunk& chunk : chunks) {
    if (!chunk.mine || !known(chunk) || problem_.tensors[chunk.tensor].norms) continue;
    const Cut& cut = decision_->cuts[chunk.layer];
    uint32_t& least = smallest[chunk.tensor];
    if (chunk.quota > 0) least = std::min(least, cut.tie);
    decision_->reading().for_aside(chunk, [&](uint32_t key, int64_t) {
      if (key >= cut.keep_from) least = std::min(least, key);
    });
  }
  for (Worker& worker : workers)
    for (size_t t = 0; t < smallest.size(); ++t)
      if (smallest[t] != kKeyEnd) worker.written.smallest[t] = 0;  // no need to look
  std::optional<Targets> mask_target;
  if (masks) mask_target.emplace(std::vector<File>{masks->file});
  const auto pieces_count = static_cast<int64_t>(pieces.size()) - 1;
  pool_.for_each(segments.empty() ? 0 : pieces_count, [&](int64_t p, int w) {
    Worker& worker = workers[w];
    const std::span<const Segment> mine(segments.data() + pieces[p], segments.data() + pieces[p + 1]);
    const int64_t begin = mine.front().begin, end = mine.back().begin + mine.back().bytes;
    // As far from a page's beginning as in the target, so that it can be written past the cache.
    char* memory = worker.bytes.room(kPage + std::max(2 * kBytes, end - begin)) + mine.front().place % kPage;
    read_fully(problem_.files[mine.front().file], memory, end - begin, begin);
    bool together = true;  // the target has the same bytes side by side
    for (const Segment& s : mine) {
      char* data = memory + (s.begin - begin);
      const bool packed = s.chunk >= 0 && places[chunks[s.chunk].tensor].bits >= 0;
      together &= !packed && s.place - mine.front().place == s.begin - begin;
      if (s.chunk < 0) {
        const Elements& e = rest[s.rest];
        worker.written.rest[s.rest] += count_set(data, s.bytes / e.size, e.size, e.mask);
        worker.written.nan[s.rest] |= any_nan(data, s.bytes / e.size, e.size, e.mask, e.most);
        continue;
      }
      const Chunk& chunk = chunks[s.chunk];
      const int64_t size = s.bytes / chunk.n;
      char* weights = data;
      if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size)) {
        weights = worker.aligned.room(s.bytes);
        std::memcpy(weights, data, static_cast<size_t>(s.bytes));
      }
      prune_chunk(w, worker, chunk, weights);
      if (mask_target) {
        const int64_t n = (chunk.n + 7) / 8;
        char* bits = worker.bits.room(n);
        pack_bits(reinterpret_cast<const uint8_t*>(worker.mask.room(most_)), chunk.n, reinterpret_cast<uint8_t*>(bits));
        mask_target->write(0, bits, n, masks->places[chunk.tensor] + chunk.offset / 8);
      }
      if (packed) {
        const int64_t n = (chunk.n + 7) / 8, count = chunk_packed_[s.chunk];
        char* bits = worker.bits.room(n);
        char* values = worker.values.room((chunk.n + 8) * size);
        for_storage(problem_.tensors[chunk.tensor].stored, [&]<typename T>() {
          const T* from = reinterpret_cast<const T*>(weights);
          if (count_set(weights, chunk.n, size, ~uint64_t{0}) != count) throw Changed(chunk.tensor);
          pack_chunk(from, chunk.n, reinterpret_cast<uint8_t*>(bits), reinterpret_cast<T*>(values),
                     reinterpret_cast<T*>(values) + count);
        });
        sink(s.file, values, count * size, s.place);
        sink(s.file, bits, n, places[chunk.tensor].bits + chunk.offset / 8);
      } else if (weights != data) {
        std::memcpy(data, weights, static_cast<size_t>(s.bytes));
      }
    }
    if (together) {
      sink(mine.front().file, memory, end - begin, mine.front().place);
    } else {
      for (const Segment& s : mine)
        if (s.chunk < 0 || places[chunks[s.chunk].tensor].bits < 0)
          sink(s.file, memory + (s.begin - begin), s.bytes, s.place);
    }
    pool_.advance(end - begin);
  });
  Written all{std::vector<int64_t>(rest.size()), std::vector<int64_t>(problem_.tensors.size()), smallest,
              std::vector<char>(rest.size())};
  for (const Worker& worker : workers) {
    for (size_t r = 0; r < rest.size(); ++r) {
      all.rest[r] += worker.written.rest[r];
      all.nan[r] |= worker.written.nan[r];
    }
    for (size_t t = 0; t < all.nonzero.size(); ++t) all.nonzero[t] += worker.written.nonzero[t];
    for (size_t t = 0; t < smallest.size(); ++t)
      if (smallest[t] == kKeyEnd) all.smallest[t] = std::min(all.smallest[t], worker.written.smallest[t]);
  }
  return all;
}

std::vector<int64_t> count_nonzero(const std::vector<File>& files, std::span<const Elements> elements,
                                   const Pool& pool) {
  struct Part {
    size_t element;
    int64_t begin, bytes;
  };
  std::vector<Part> parts;
  int64_t all = 0;
  for (size_t e = 0; e < elements.size(); ++e) {
    const int64_t bytes = elements[e].count * elements[e].size, step = kRest / elements[e].size * elements[e].size;
    for (int64_t at = 0; at < bytes; at += step) parts.push_back({e, at, std::min(step, bytes - at)});
    all += bytes;
  }
  pool.begin("reading", all);
  std::vector<std::atomic<int64_t>> counts(elements.size());
  std::vector<Buffer> buffers(static_cast<size_t>(pool.workers()));
  pool.for_each(static_cast<int64_t>(parts.size()), [&](int64_t i, int worker) {
    const Part& part = parts[i];
    const Elements& e = elements[part.element];
    char* memory = buffers[worker].room(kRest);
    read_fully(files[e.file], memory, part.bytes, e.offset + part.begin);
    counts[part.element] += count_set(memory, part.bytes / e.size, e.size, e.mask);
    pool.advance(part.bytes);
  });
  return {counts.begin(), counts.end()};
}

}  // namespace dimap::cpu
