#include "cpu/files/expand.h"

#include <algorithm>
#include <utility>

#include "cpu/files/io.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kBytes =
    int64_t{1} << 21;  // of a dense file that are written at a time; holds a multiple of 8 weights

struct Part {
  int64_t tensor, begin, n;  // weights
  int64_t first = 0;         // value
  int64_t count = 0;         // values
};

int64_t bytes_of(int64_t bits) { return bits / 8 + (bits % 8 != 0); }

struct Buffers {
  Buffer bits, values, dense;
};

}  // namespace

void expand(const std::vector<File>& files, const std::vector<File>& target_files, std::span<const Packed> tensors,
            std::span<const Copied> copied, const Pool& pool) {
  std::vector<Part> parts;
  int64_t dense = 0, bits = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t step = kBytes / tensors[t].size;
    for (int64_t at = 0; at < tensors[t].numel; at += step)
      parts.push_back({static_cast<int64_t>(t), at, std::min(step, tensors[t].numel - at)});
    dense += tensors[t].numel * tensors[t].size;
    bits += bytes_of(tensors[t].numel);
  }
  std::vector<Buffers> buffers(static_cast<size_t>(pool.workers()));
  const auto read_bits = [&](const Part& part, int worker) {
    const Packed& t = tensors[part.tensor];
    char* memory = buffers[worker].bits.room(bytes_of(part.n));
    read_fully(files[t.bits_file], memory, bytes_of(part.n), t.bits + part.begin / 8);
    return reinterpret_cast<const uint8_t*>(memory);
  };
  pool.begin("reading the bits", bits);
  pool.for_each(static_cast<int64_t>(parts.size()), [&](int64_t p, int worker) {
    Part& part = parts[p];
    const uint8_t* found = read_bits(part, worker);
    part.count = count_bits(found, bytes_of(part.n));
    if (part.n % 8 && found[part.n / 8] >> part.n % 8) throw BadBits(part.tensor, -1, -1);
    pool.advance(bytes_of(part.n));
  });
  std::vector<int64_t> values(tensors.size());
  for (Part& part : parts) part.first = std::exchange(values[part.tensor], values[part.tensor] + part.count);
  for (size_t t = 0; t < tensors.size(); ++t)
    if (values[t] != tensors[t].count) throw BadBits(static_cast<int64_t>(t), values[t], tensors[t].count);

  Targets targets(target_files);
  std::vector<Copied> copies;
  for (const Copied& c : copied) {
    for (int64_t at = 0; at < c.bytes; at += kBytes)
      copies.push_back({c.file, c.offset + at, std::min(kBytes, c.bytes - at), c.place + at});
    dense += c.bytes;
  }
  pool.begin("expanding", dense);
  const auto write = [&](int32_t file, int64_t bytes, int64_t place, int worker, auto&& fill) {
    char* memory = buffers[worker].dense.room(kPage + kBytes) + place % kPage;  // as it lies in the file
    fill(memory);
    targets.write(file, memory, bytes, place);
    pool.advance(bytes);
  };
  pool.for_each(static_cast<int64_t>(parts.size()), [&](int64_t p, int worker) {
    const Part& part = parts[p];
    const Packed& t = tensors[part.tensor];
    const uint8_t* found = read_bits(part, worker);
    if (const int64_t got = count_bits(found, bytes_of(part.n)); got != part.count)
      throw BadBits(part.tensor, got, part.count);
    char* kept = buffers[worker].values.room(part.count * t.size + 64);
    read_fully(files[t.file], kept, part.count * t.size, t.values + part.first * t.size);
    write(t.file, part.n * t.size, t.place + part.begin * t.size, worker,
          [&](char* memory) { unpack_chunk(found, kept, part.count, memory, part.n, t.size); });
  });
  pool.for_each(static_cast<int64_t>(copies.size()), [&](int64_t c, int worker) {
    const Copied& copy = copies[c];
    write(copy.file, copy.bytes, copy.place, worker,
          [&](char* memory) { read_fully(files[copy.file], memory, copy.bytes, copy.offset); });
  });
}

}  // namespace dimap::cpu
