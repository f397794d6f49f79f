// The kernels without torch, for the sanitizers: every path once, against a plain sort.
//
// Exits with 0 when all agree, 1 when not, 77 when the instruction set asked for is not there.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/apply.h"
#include "cpu/isa/decide.h"
#include "cpu/nm.h"
#include "cpu/score/score.h"
#include "cpu/select/engine.h"
#include "cpu/sparse/pack.h"

namespace {

using namespace dimap;

class Threads final : public cpu::Pool {
 public:
  explicit Threads(int n) : n_(n) {}
  int workers() const override { return n_; }
  void run(const std::function<void(int)>& body) const override {
    std::vector<std::thread> threads;
    for (int i = 1; i < n_; ++i) threads.emplace_back(body, i);
    body(0);
    for (std::thread& t : threads) t.join();
  }

 private:
  int n_;
};

int failures = 0;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (0)

#if defined(__aarch64__)
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif

struct Layer {
  std::vector<uint32_t> keys;
  std::vector<double> scores;
};

// score64 of a layer the plain way: sort, exact energy, divide.
void score_plainly(Layer& layer) {
  std::vector<size_t> order(layer.keys.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return layer.keys[a] > layer.keys[b]; });
  layer.scores.resize(order.size());
  Energy energy;
  for (size_t i = 0; i < order.size();) {
    size_t j = i;
    for (; j < order.size() && layer.keys[order[j]] == layer.keys[order[i]]; ++j)
      energy.add(square(layer.keys[order[i]]), scale(layer.keys[order[i]]));
    for (; i < j; ++i) layer.scores[order[i]] = score64(layer.keys[order[i]], energy.value());
  }
}

template <DType kType>
storage_t<kType> stored(float w) {
  if constexpr (kType == DType::kFloat32) return std::bit_cast<uint32_t>(w);
  if constexpr (kType == DType::kBFloat16) return static_cast<uint16_t>(std::bit_cast<uint32_t>(w) >> 16);
  if constexpr (kType == DType::kFloat16)
    return std::bit_cast<uint16_t>(static_cast<Float16>(std::clamp(w, -65504.0f, 65504.0f)));
}

// One module, whose layers are the tensors.
template <DType kType>
Problem problem_of(const std::vector<std::vector<storage_t<kType>>>& data) {
  Problem problem;
  for (size_t i = 0; i < data.size(); ++i)
    problem.tensors.push_back({data[i].data(), static_cast<int64_t>(data[i].size()), kType, static_cast<int32_t>(i)});
  problem.layer_module.assign(data.size(), 0);
  problem.keep.assign(1, 0);
  problem.count();
  return problem;
}

template <typename T>
std::vector<T*> pointers(std::vector<std::vector<T>>& tensors) {
  std::vector<T*> out;
  for (auto& tensor : tensors) out.push_back(tensor.data());
  return out;
}

bool within_one_ulp(float score, double want) {
  return std::abs(std::bit_cast<int32_t>(score) - std::bit_cast<int32_t>(static_cast<float>(want))) <= 1;
}

template <DType kType>
void check(const std::vector<std::vector<float>>& tensors, double share, const cpu::Pool& pool) {
  using T = storage_t<kType>;
  std::vector<std::vector<T>> data;
  for (const auto& tensor : tensors) {
    data.emplace_back();
    for (const float w : tensor) data.back().push_back(stored<kType>(w));
  }
  Problem problem = problem_of<kType>(data);
  const int64_t total = problem.module_total[0];
  problem.keep[0] = static_cast<int64_t>(share * static_cast<double>(total));

  std::vector<Layer> layers(data.size());
  std::vector<std::pair<double, int64_t>> all;
  for (size_t i = 0; i < data.size(); ++i) {
    for (const T w : data[i]) layers[i].keys.push_back(key_of<kType>(w));
    score_plainly(layers[i]);
    for (const double s : layers[i].scores) all.emplace_back(-s, static_cast<int64_t>(all.size()));
  }
  std::sort(all.begin(), all.end());
  std::vector<uint8_t> want(static_cast<size_t>(total));
  for (int64_t i = 0; i < problem.keep[0]; ++i) want[static_cast<size_t>(all[static_cast<size_t>(i)].second)] = 1;

  std::vector<std::vector<uint8_t>> masks;
  std::vector<std::vector<float>> scores;
  for (const auto& tensor : data) {
    masks.emplace_back(tensor.size(), uint8_t{7});
    scores.emplace_back(tensor.size());
  }
  cpu::select(problem, pointers(masks), pool);
  cpu::score(problem, pointers(scores), pool);
  size_t at = 0;
  for (size_t i = 0; i < data.size(); ++i) {
    EXPECT(std::equal(masks[i].begin(), masks[i].end(), want.begin() + static_cast<std::ptrdiff_t>(at)));
    at += data[i].size();
    for (size_t j = 0; j < data[i].size(); ++j) EXPECT(within_one_ulp(scores[i][j], layers[i].scores[j]));
  }
  auto zeroed = data;
  std::vector<cpu::Applied> work;
  for (size_t i = 0; i < data.size(); ++i)
    work.push_back({zeroed[i].data(), masks[i].data(), static_cast<int64_t>(data[i].size()), sizeof(T)});
  cpu::apply(work, pool);
  cpu::prune(problem, pool);  // writes data
  for (size_t i = 0; i < data.size(); ++i) EXPECT(data[i] == zeroed[i]);
}

// A layer that all workers share, masks that are written past the caches: too large to sort its scores, so what they
// must be is asked of every 997th weight.
void check_large(const std::vector<float>& weights, const cpu::Pool& pool) {
  std::vector<std::vector<uint32_t>> data(1);
  for (const float w : weights) data[0].push_back(stored<DType::kFloat32>(w));
  Problem problem = problem_of<DType::kFloat32>(data);
  const auto total = data[0].size(), keep = total * 9 / 20;
  problem.keep[0] = static_cast<int64_t>(keep);
  std::vector<std::vector<uint8_t>> masks(1, std::vector<uint8_t>(total, 7));
  std::vector<std::vector<float>> scores(1, std::vector<float>(total));
  cpu::select(problem, pointers(masks), pool);
  cpu::score(problem, pointers(scores), pool);

  std::vector<uint32_t> keys;
  for (const uint32_t w : data[0]) keys.push_back(key_of<DType::kFloat32>(w));
  std::vector<std::pair<uint32_t, size_t>> asked;  // key, place
  for (size_t i = 0; i < total; i += 997) asked.emplace_back(keys[i], i);
  std::sort(asked.rbegin(), asked.rend());
  std::vector<uint32_t> sorted = keys;
  std::sort(sorted.rbegin(), sorted.rend());
  Energy energy;
  size_t next = 0;
  for (const auto& [key, place] : asked) {
    for (; next < total && sorted[next] >= key; ++next) energy.add(square(sorted[next]), scale(sorted[next]));
    EXPECT(within_one_ulp(scores[0][place], score64(key, energy.value())));
  }
  const uint32_t cut = sorted[keep - 1];
  auto ties = static_cast<int64_t>(keep) -
              (std::lower_bound(sorted.begin(), sorted.end(), cut, std::greater<>()) - sorted.begin());
  int64_t wrong = 0;
  for (size_t i = 0; i < total; ++i) wrong += masks[0][i] != (keys[i] > cut || (keys[i] == cut && ties-- > 0));
  EXPECT(wrong == 0);
  cpu::prune(problem, pool);  // writes data
  for (size_t i = 0; i < total; ++i) wrong += (data[0][i] != 0) != (masks[0][i] && keys[i] != 0);
  EXPECT(wrong == 0);
}

// The deciding loop alone, on brackets at random, beside what it is to do said plainly.
template <DType kType>
void check_decide(std::mt19937_64& random) {
  using T = storage_t<kType>;
  const auto n = static_cast<int64_t>(random() % 700);
  std::vector<T> weights(static_cast<size_t>(n) + 1);
  std::normal_distribution<float> normal(0, std::ldexp(1.0f, static_cast<int>(random() % 40) - 26));
  const float far = std::ldexp(1.0f, static_cast<int>(random() % 12));
  for (T& w : weights) w = stored<kType>(normal(random) * (random() % 16 ? 1.0f : far));
  if (random() % 8 == 0) weights[random() % weights.size()] = stored<kType>(random() % 2 ? INFINITY : -NAN);
  const auto some_key = [&] { return key_of<kType>(weights[random() % weights.size()]); };
  cpu::Bracket bracket;
  bracket.low = some_key() + static_cast<uint32_t>(random() % 4 ? 0 : random() % 70'000);
  bracket.high = random() % 4 ? some_key() : bracket.low + static_cast<uint32_t>(random() % 100'000);
  if (bracket.low > bracket.high) std::swap(bracket.low, bracket.high);
  if (random() % 8 == 0) bracket.low = bracket.high;
  if (random() % 16 == 0) bracket.low = bracket.high = kKeyEnd;
  bracket.guess = bracket.low + static_cast<uint32_t>(random() % (bracket.high - bracket.low + 1));
  if (random() % 16 == 0)  // nothing lies inside
    bracket.low = std::min(bracket.high + static_cast<uint32_t>(random() % 100'000'000), uint32_t{kKeyEnd});
  if (random() % 3 == 0) {  // some weight's key, or between two
    bracket.atom = some_key() + static_cast<uint32_t>(random() % 2 ? 0 : random() % 70'000);
    if (bracket.atom >= bracket.high) bracket.atom = cpu::Bracket::kNoAtom;
  }
  const bool masked = random() % 4, summed = random() % 4;

  std::vector<uint32_t> want_keys, keys(static_cast<size_t>(n + cpu::Decided::kSlack));
  std::vector<uint16_t> want_positions, positions(keys.size());
  std::vector<uint8_t> want_mask(static_cast<size_t>(n), 7), mask = want_mask;
  Energy want_energy, energy;
  int64_t kept = 0, atoms = 0;
  bool non_finite = false;
  const cpu::Grid grid(bracket.high);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of<kType>(weights[static_cast<size_t>(i)]);
    non_finite |= key >= kNonFinite;
    atoms += key == bracket.atom;
    kept += key >= bracket.high;
    if (masked) want_mask[static_cast<size_t>(i)] = key >= bracket.guess && key != bracket.atom;
    if (key >= bracket.high && key < (summed ? kNonFinite : grid.limit)) want_energy.add(square(key), scale(key));
    if (key < bracket.low || key >= bracket.high || key == bracket.atom) continue;
    want_keys.push_back(key);
    want_positions.push_back(static_cast<uint16_t>(i));
  }
  ExponentSums outliers;
  cpu::Decided out;
  out.keys = keys.data(), out.positions = positions.data(), out.outliers = summed ? &outliers : nullptr;
  out.stream = random() % 2;
  cpu::kernels().decide[static_cast<int>(kType)](weights.data(), n, bracket, masked ? mask.data() : nullptr, out);
  if (out.grid_sum()) energy.add(out.grid_sum(), static_cast<int>(grid.exponent) - 1);
  outliers.move_to(energy);
  EXPECT(mask == want_mask);
  EXPECT(out.kept == kept && out.atoms == atoms && out.non_finite == non_finite);
  EXPECT(std::equal(want_keys.begin(), want_keys.end(), keys.begin(), keys.begin() + out.aside));
  EXPECT(std::equal(want_positions.begin(), want_positions.end(), positions.begin(), positions.begin() + out.aside));
  EXPECT(energy.limbs() == want_energy.limbs());
}

// An infinity or a NaN among the weights is found where it is, and nothing is written.
template <DType kType>
void check_non_finite(const std::vector<float>& weights, size_t place, float value, const cpu::Pool& pool) {
  std::vector<std::vector<storage_t<kType>>> data(3);
  for (const float w : weights) data[1].push_back(stored<kType>(w));
  data[0].assign(70, stored<kType>(1.0f)), data[2] = data[1];
  data[1][place] = kType == DType::kFloat16 ? static_cast<storage_t<kType>>(std::isnan(value) ? 0xFC01 : 0xFC00)
                                            : stored<kType>(value);
  Problem problem = problem_of<kType>(data);
  std::vector<std::vector<uint8_t>> masks;
  std::vector<std::vector<float>> scores;
  for (const auto& tensor : data) masks.emplace_back(tensor.size()), scores.emplace_back(tensor.size());
  const auto before = data;
  const char* name = std::isnan(value) ? "nan" : kType == DType::kFloat16 || value < 0 ? "-inf" : "inf";
  const auto found = [&](auto&& run) {
    try {
      run();
    } catch (const NonFinite& e) {
      return e.tensor == 1 && e.index == static_cast<int64_t>(place) && std::string(e.name) == name;
    }
    return false;
  };
  for (const int64_t keep : {int64_t{0}, problem.module_total[0] / 2, problem.module_total[0]}) {
    problem.keep[0] = keep;
    EXPECT(found([&] { cpu::select(problem, pointers(masks), pool); }));
    EXPECT(found([&] { cpu::prune(problem, pool); }));
    EXPECT(data == before);
  }
  EXPECT(found([&] { cpu::score(problem, pointers(scores), pool); }));
}

// There and back, at every number of weights near the edges of bytes and chunks.
template <typename T>
void check_packing(int64_t n, double density, std::mt19937_64& random, const cpu::Pool& pool) {
  std::vector<T> weights(static_cast<size_t>(n)), values, back(weights.size(), T{7});
  for (T& w : weights)
    if (static_cast<double>(random() % 1000) < density * 1000) w = static_cast<T>(random() | 1);
  std::copy_if(weights.begin(), weights.end(), std::back_inserter(values), [](T w) { return w != 0; });
  const cpu::Packing packing{n, sizeof(T)};
  const std::vector<int64_t> offsets = cpu::offsets_of_weights(weights.data(), packing, pool);
  EXPECT(offsets.back() == static_cast<int64_t>(values.size()));
  std::vector<uint8_t> bits(static_cast<size_t>(packing.bytes()), 0xAA);
  std::vector<T> packed(values.size());
  cpu::pack(weights.data(), packing, offsets, bits.data(), packed.data(), pool);
  EXPECT(packed == values);
  for (int64_t i = 0; i < 8 * packing.bytes(); ++i)
    EXPECT((bits[static_cast<size_t>(i / 8)] >> i % 8 & 1) == (i < n && weights[static_cast<size_t>(i)] != 0));
  EXPECT(cpu::offsets_of_bits(bits.data(), packing, pool) == offsets);
  cpu::unpack(bits.data(), packed.data(), packing, offsets, back.data(), pool);
  EXPECT(back == weights);
}

// Groups of any size, with the weights of each side by side or apart, whatever lies behind the last.
template <DType kType>
void check_groups(std::mt19937_64& random, const cpu::Pool& pool) {
  using T = storage_t<kType>;
  const int m = 2 + static_cast<int>(random() % 15), n = static_cast<int>(random() % static_cast<uint64_t>(m + 1));
  const int64_t blocks = static_cast<int64_t>(random() % 40), inners[] = {1, 1, 3, 33, 70};
  const int64_t inner = inners[random() % 5], numel = blocks * m * inner;
  std::vector<T> weights(static_cast<size_t>(numel));
  for (T& w : weights) w = static_cast<T>(random() % 9 + (random() % 2 << (8 * sizeof(T) - 1)));  // ties, both signs
  std::vector<uint8_t> mask(weights.size(), 7), want(weights.size());
  for (int64_t g = 0; g < blocks * inner; ++g) {
    const int64_t first = g / inner * m * inner + g % inner;
    const auto at = [&](int i) { return static_cast<size_t>(first + i * inner); };
    std::vector<int> order(static_cast<size_t>(m));
    for (int i = 0; i < m; ++i) order[static_cast<size_t>(i)] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return key_of<kType>(weights[at(a)]) > key_of<kType>(weights[at(b)]); });
    for (int i = 0; i < n; ++i) want[at(order[static_cast<size_t>(i)])] = 1;
  }
  const std::vector<T> before = weights;
  const cpu::Grouped masked{weights.data(), mask.data(), blocks, inner, kType};
  cpu::select_nm({&masked, 1}, n, m, pool);
  EXPECT(mask == want && weights == before);
  const cpu::Grouped zeroed{weights.data(), nullptr, blocks, inner, kType};
  cpu::zero_nm({&zeroed, 1}, n, m, pool);
  for (size_t i = 0; i < weights.size(); ++i) EXPECT(weights[i] == (want[i] ? before[i] : T{0}));
}

}  // namespace

int main() {
  const char* isa = std::getenv("DIMAP_ISA");
  const cpu::Kernels* available[3];
  const int n = cpu::available_kernels(available);
  if (isa && std::none_of(available, available + n, [&](const auto* k) { return !std::strcmp(k->name, isa); }))
    return 77;

  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  auto draw = [&](size_t count, auto&& value) {
    std::vector<float> out(count);
    for (float& w : out) w = value();
    return out;
  };
  const auto gauss = [&] { return normal(random); };
  const auto zeros = [&] { return random() % 20 ? 0.0f : normal(random); };
  const auto cauchy = [&] { return normal(random) / normal(random) * 1e-3f; };
  const auto grid = [&] { return static_cast<float>(static_cast<int>(random() % 255) - 127); };
  const auto denormal = [&] { return std::bit_cast<float>(static_cast<uint32_t>(random() % 0x700000)); };
  const auto wide = [&] { return std::ldexp(normal(random), static_cast<int>(random() % 200) - 100); };
  const auto same = [] { return -0.25f; };
  const auto alike = [&] { return std::bit_cast<float>(static_cast<uint32_t>(0x3F800000 + random() % 300)); };
  for (int i = 0; i < 3000; ++i) {
    check_decide<DType::kFloat32>(random);
    check_decide<DType::kBFloat16>(random);
    check_decide<DType::kFloat16>(random);
  }
  for (int i = 0; i < 300; ++i) {
    check_groups<DType::kFloat32>(random, Threads(1));
    check_groups<DType::kBFloat16>(random, Threads(2));
    check_groups<DType::kFloat16>(random, Threads(1));
  }
  for (const int workers : {1, 3}) {
    const Threads pool(workers);
    for (const double share : {0.45, 0.0, 1.0, 0.02, 0.98}) {
      check<DType::kFloat32>({draw(70'000, gauss), {}, draw(131, cauchy), draw(20'001, gauss)}, share, pool);
      check<DType::kFloat32>({draw(30'000, zeros), draw(9'000, grid), draw(3'000, same)}, share, pool);
      check<DType::kFloat32>({draw(9'000, denormal), draw(9'000, wide), draw(1, same)}, share, pool);
      check<DType::kBFloat16>({draw(40'000, gauss), draw(9'000, zeros), draw(64, wide)}, share, pool);
      check<DType::kFloat16>({draw(40'000, gauss), draw(9'000, zeros), draw(64, wide), draw(3'000, grid)}, share, pool);
      check<DType::kFloat32>({draw(200'000, same)}, share, pool);
      check<DType::kFloat32>({draw(90'000, alike), draw(70'000, denormal), draw(70'000, wide)}, share, pool);
    }
    for (const float value : {INFINITY, -INFINITY, NAN})
      for (const size_t place : {size_t{0}, size_t{65'536}}) {
        check_non_finite<DType::kFloat32>(draw(70'000, gauss), place, value, pool);
        check_non_finite<DType::kBFloat16>(draw(70'000, gauss), place, value, pool);
        check_non_finite<DType::kFloat16>(draw(70'000, gauss), place, value, pool);
        check_non_finite<DType::kFloat32>(draw(place + 1, gauss), place, value, pool);
      }
  }
  check_large(draw((1 << 23) + 77, gauss), Threads(3));
  for (const int workers : {1, 3})
    for (const int64_t n : {0, 1, 7, 8, 9, 65'535, 65'536, 65'537, 200'003})
      for (const double density : {0.0, 0.003, 0.45, 1.0}) {
        check_packing<uint32_t>(n, density, random, Threads(workers));
        check_packing<uint16_t>(n, density, random, Threads(workers));
      }
  std::printf("%s: %d failures\n", isa ? isa : cpu::kernels().name, failures);
  return failures != 0;
}
