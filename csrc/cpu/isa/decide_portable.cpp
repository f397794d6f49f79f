// What every processor of a kind has: SSE2 on x86-64, NEON on 64-bit ARM, and plain C++ elsewhere.
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/isa/mark_lanes.h"

namespace dimap::cpu {
namespace {

#if defined(__SSE2__)
struct Portable : Vectors<16> {
  static constexpr int kBytes = 16;
  template <typename V>
  static __m128i raw(V v) {
    return reinterpret_cast<__m128i>(v);
  }
  template <typename V>
  static Bytes narrow(V a, V b, V c, V d) {
    return narrow(_mm_packs_epi32(raw(a), raw(b)), _mm_packs_epi32(raw(c), raw(d)));
  }
  template <typename V>
  static Bytes narrow(V a, V b) {
    return reinterpret_cast<Bytes>(_mm_packs_epi16(raw(a), raw(b)));
  }
  static uint32_t bits(Bytes lanes) { return static_cast<uint32_t>(_mm_movemask_epi8(raw(lanes))); }
  static Longs squares(Words q) { return reinterpret_cast<Longs>(_mm_mul_epu32(raw(q), raw(q))); }
  static Words pairs(Shorts q) { return reinterpret_cast<Words>(_mm_madd_epi16(raw(q), raw(q))); }
  static Shorts shifted(Shorts m, Shorts by) {  // no shift by lanes: doubled as often
    const auto times = reinterpret_cast<SignedShorts>(by);
    for (int16_t done = 0; done < 5; ++done) m += m & reinterpret_cast<Shorts>(times > done);
    return m;
  }
  static void stream(uint8_t* to, Bytes bytes) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), raw(bytes)); }
  static void fence() { _mm_sfence(); }
};
#elif defined(__aarch64__)
struct Portable : Vectors<16> {
  static constexpr int kBytes = 16;
  template <typename V>
  static Bytes narrow(V a, V b, V c, V d) {
    const auto short_of = [](V x, V y) {
      return vuzp1q_u16(reinterpret_cast<uint16x8_t>(x), reinterpret_cast<uint16x8_t>(y));
    };
    return narrow(short_of(a, b), short_of(c, d));
  }
  template <typename V>
  static Bytes narrow(V a, V b) {
    return reinterpret_cast<Bytes>(vuzp1q_u8(reinterpret_cast<uint8x16_t>(a), reinterpret_cast<uint8x16_t>(b)));
  }
  static uint32_t bits(Bytes lanes) {
    constexpr Bytes kBit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const auto each = reinterpret_cast<uint8x16_t>(lanes & kBit);
    return vaddv_u8(vget_low_u8(each)) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(each))) << 8;
  }
  static Longs squares(Words q) {
    const uint32x2_t low = vmovn_u64(reinterpret_cast<uint64x2_t>(q));
    return reinterpret_cast<Longs>(vmull_u32(low, low));
  }
  static Words pairs(Shorts q) {
    const auto v = reinterpret_cast<uint16x8_t>(q);
    return reinterpret_cast<Words>(vmlal_high_u16(vmull_u16(vget_low_u16(v), vget_low_u16(v)), v, v));
  }
  static Shorts shifted(Shorts m, Shorts by) {
    return reinterpret_cast<Shorts>(vshlq_u16(reinterpret_cast<uint16x8_t>(m), reinterpret_cast<int16x8_t>(by)));
  }
  static void stream(uint8_t* to, Bytes bytes) { memcpy(to, &bytes, sizeof bytes); }
  static void fence() {}
};
#endif

template <DType kType>
void decide(const void* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
#if defined(__SSE2__) || defined(__aarch64__)
  decide_lanes<Portable, kType>(weights, n, bracket, mask, out);
#else
  decide_range<kType>(static_cast<const storage_t<kType>*>(weights), 0, n, bracket, Grid(bracket.high), mask, out);
#endif
}

template <DType kType>
void zero(void* weights, int64_t n, uint32_t keep_from, uint32_t tie) {
  zero_range<kType>(static_cast<storage_t<kType>*>(weights), n, keep_from, tie);
}

template <typename T>
uint32_t mark(const void* given, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
#if defined(__SSE2__) || defined(__aarch64__)
  return mark_groups<Portable, T>(given, blocks, inner, n, m, mask);
#else
  constexpr T kMagnitude = static_cast<T>(~T{0}) >> 1;
  const auto* weights = static_cast<const T*>(given);
  T largest = 0;
  for (int64_t group = 0; group < blocks * inner; ++group) {
    const int64_t first = group / inner * m * inner + group % inner;
    T keys[kMostInGroup];
    for (int i = 0; i < m; ++i) {
      keys[i] = weights[first + i * inner] & kMagnitude;
      largest = std::max(largest, keys[i]);
    }
    for (int i = 0; i < m; ++i) {
      int rank = 0;
      for (int j = 0; j < m; ++j) rank += keys[j] > keys[i] || (keys[j] == keys[i] && j < i);
      mask[first + i * inner] = rank < n;
    }
  }
  return largest;
#endif
}

}  // namespace

const Kernels kPortable = {
    "portable",
    {decide<DType::kFloat32>, decide<DType::kBFloat16>, decide<DType::kFloat16>},
    {zero<DType::kFloat32>, zero<DType::kBFloat16>, zero<DType::kFloat16>},
    score_rows_portable,
    {mark<uint32_t>, mark<uint16_t>, mark<uint16_t>},
};

}  // namespace dimap::cpu
