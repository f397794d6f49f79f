// What translated PTX calls (see translate.py): memory with its checks, barriers, warps, arithmetic that C++ lacks.
//
// Checked are the alignment of every access; races on shared memory between two barriers (of the block, or of the
// warp); reads of shared memory that nobody has written; and on global memory what another block wrote with no grid
// barrier or fence in between, what another thread of the block wrote with no barrier, and workspace that nobody has
// written. A finding is reported once for each place, and the kernel goes on.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "emulator.h"

namespace ptx {

// A vector clock over the blocks of a grid: what of each block happened before.
using Clock = std::vector<uint32_t>;

struct Entry {
  const char* key;
  void (*run)(struct Thread&, const char* parameters);
  uint32_t shared;   // bytes, static
  uint32_t threads;  // at most
};
extern const Entry entries[];

// A thread of the kernel that runs.
struct Thread {
  const char* kernel;
  uint32_t dynamic;     // where dynamic shared memory starts
  uint32_t barred = 0;  // barriers of its warp so far
  uint32_t now = 0;     // loads that had to wait for each other so far
  Clock fenced;         // what a fence has published, not yet told
  Clock heard;          // what a relaxed load has heard, not yet acquired by a fence

  void wait(uint32_t until) { now = std::max(now, until); }
  uint32_t loaded() const { return now + 1; }
};

// Faults for tests: the one instruction that goes wrong, by its number, and which have run.
extern int planted_site;
extern char sites_seen[];
inline bool planted(int site) {
  sites_seen[site] = 1;
  return site == planted_site;
}

void report(const Thread& t, const char* where, const char* what);
[[noreturn]] void fail(const Thread& t, const char* where, const char* what);

// Now and then lets another thread of the block run, where the test wants that.
void may_yield();
void pause();

void block_barrier(Thread& t);
bool any_in_block(Thread& t, bool mine);
void warp_barrier(Thread& t, uint32_t lanes);
void fence(Thread& t);
uint32_t grid_barrier_high();
uint32_t grid_barrier_low();

template <typename D, typename S>
D as(S x) {
  if constexpr (sizeof(D) == sizeof(S))
    return std::bit_cast<D>(x);
  else
    return static_cast<D>(x);
}
template <typename R, typename V>
void put(R& to, V value) {
  if constexpr (sizeof(R) == sizeof(V))
    to = std::bit_cast<R>(value);
  else
    to = static_cast<R>(value);
}

// Memory.

enum class Access { kRead, kWrite, kAtomic };
void touch_shared(Thread& t, const char* where, uint32_t at, uint32_t bytes, Access access);
void touch_global(Thread& t, const char* where, uint64_t at, uint32_t bytes, Access access);
char* shared_memory();
// Of a word that threads talk through: publishes what happened before, or hears what the word was told.
void tell(Thread& t, uint64_t at, bool release);
void hear(Thread& t, uint64_t at, bool acquire);

template <uint32_t kBytes>
[[gnu::noinline]] void check_aligned(Thread& t, const char* where, uint64_t at) {
  if (at % kBytes) report(t, where, "misaligned");
}
template <uint32_t kBytes>
[[gnu::noinline]] void check_vector(Thread& t, const char* where, uint64_t at, bool shifted) {
  check_aligned<kBytes>(t, where, at + (shifted ? kBytes / 2 : 0));
}
template <typename T>
T plain(uint64_t at) {
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(at), sizeof value);
  return value;
}
template <typename T>
void set_plain(uint64_t at, T value) {
  std::memcpy(reinterpret_cast<void*>(at), &value, sizeof value);
}
template <typename T>
[[gnu::noinline]] T load(Thread& t, const char* where, uint64_t at) {
  may_yield();
  touch_global(t, where, at, sizeof(T), Access::kRead);
  return plain<T>(at);
}
// weakened: a planted fault has taken the order away.
template <typename T>
[[gnu::noinline]] T load_strong(Thread& t, const char* where, uint64_t at, bool acquire) {
  pause();
  (void)where;
  T value;
  __atomic_load(reinterpret_cast<T*>(at), &value, __ATOMIC_ACQUIRE);
  hear(t, at, acquire);
  return value;
}
template <typename T>
[[gnu::noinline]] void store(Thread& t, const char* where, uint64_t at, T value, bool strong, bool release) {
  may_yield();
  touch_global(t, where, at, sizeof(T), strong ? Access::kAtomic : Access::kWrite);
  if (strong) tell(t, at, release);
  if (strong)
    __atomic_store(reinterpret_cast<T*>(at), &value, __ATOMIC_RELEASE);
  else
    set_plain(at, value);
}
template <typename T>
[[gnu::noinline]] T load_shared(Thread& t, const char* where, uint32_t at) {
  may_yield();
  touch_shared(t, where, at, sizeof(T), Access::kRead);
  return plain<T>(reinterpret_cast<uint64_t>(shared_memory() + at));
}
template <typename T>
[[gnu::noinline]] void store_shared(Thread& t, const char* where, uint32_t at, T value) {
  may_yield();
  touch_shared(t, where, at, sizeof(T), Access::kWrite);
  set_plain(reinterpret_cast<uint64_t>(shared_memory() + at), value);
}
// kWhat: + > < | & as they are, = exchanges, ? compares and swaps.
template <typename T, char kWhat>
T after(T old, T value, T other) {
  if constexpr (kWhat == '+') return static_cast<T>(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value));
  if constexpr (kWhat == '>') return std::max(old, value);
  if constexpr (kWhat == '<') return std::min(old, value);
  if constexpr (kWhat == '|') return old | value;
  if constexpr (kWhat == '&') return old & value;
  if constexpr (kWhat == '=') return value;
  if constexpr (kWhat == '?') return old == value ? other : old;
}
template <typename T, char kWhat>
[[gnu::noinline]] T atomic_shared(Thread& t, const char* where, uint32_t at, T value, T other = {}) {
  may_yield();
  touch_shared(t, where, at, sizeof(T), Access::kAtomic);
  const auto address = reinterpret_cast<uint64_t>(shared_memory() + at);
  const T old = plain<T>(address);
  set_plain<T>(address, after<T, kWhat>(old, value, other));
  return old;
}
template <typename T, char kWhat>
[[gnu::noinline]] T atomic(Thread& t, const char* where, uint64_t at, bool release, bool acquire, T value,
                           T other = {}) {
  may_yield();
  touch_global(t, where, at, sizeof(T), Access::kAtomic);
  tell(t, at, release);
  T* word = reinterpret_cast<T*>(at);
  T old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, after<T, kWhat>(old, value, other), false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_RELAXED)) {
  }
  hear(t, at, acquire);
  return old;
}

// Warps: all lanes, always.

template <char kMode>
uint32_t shuffle(Thread& t, uint32_t value, uint32_t by, uint32_t clamp, bool& ok, bool shifted) {
  (void)t;
  const uint32_t lane = threadIdx.x % 32, segment = clamp >> 8 & 31, last = (lane & segment) | (clamp & 31 & ~segment);
  const uint64_t* all = emulator::exchange_in_warp(value);
  uint32_t from = lane;
  if constexpr (kMode == 'd') from = lane + (by & 31), ok = from <= last;
  if constexpr (kMode == 'u') from = lane - (by & 31), ok = static_cast<int>(from) >= static_cast<int>(last);
  if constexpr (kMode == 'b') from = lane ^ (by & 31), ok = from <= last;
  if constexpr (kMode == 'i') from = (lane & segment) | (by & 31 & ~segment), ok = from <= last;
  if (!ok) from = lane;
  return static_cast<uint32_t>(all[shifted ? from & 30 : from]);
}
template <typename T>
T reduce(Thread&, char what, T value) {
  const uint64_t* all = emulator::exchange_in_warp(value);
  auto sum = static_cast<T>(all[0]);
  for (int i = 1; i < 32; ++i) {
    const auto next = static_cast<T>(all[i]);
    sum = what == 'd'   ? sum + next
          : what == 'i' ? std::min(sum, next)
          : what == 'a' ? std::max(sum, next)
          : what == 'r' ? sum | next
                        : sum & next;
  }
  return sum;
}
template <char kWhat>  // ba_l_lot, a_n_y, a_l_l by their second letters
auto vote(Thread&, bool mine) {
  const uint64_t* all = emulator::exchange_in_warp(mine);
  uint32_t lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= static_cast<uint32_t>(all[i]) << i;
  if constexpr (kWhat == 'a') return lanes;  // ballot
  if constexpr (kWhat == 'n') return lanes != 0;
  if constexpr (kWhat == 'l') return lanes == 0xFFFFFFFFu;
}
inline uint32_t match_any(Thread&, uint32_t mine) {
  const uint64_t* all = emulator::exchange_in_warp(mine);
  uint32_t lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= static_cast<uint32_t>(all[i] == mine) << i;
  return lanes;
}

// Arithmetic.

template <typename D, typename S>
D to_integer(S x, char mode) {  // saturates, as PTX does
  if (std::isnan(x)) return 0;
  const S whole = mode == 'z'   ? std::trunc(x)
                  : mode == 'm' ? std::floor(x)
                  : mode == 'p' ? std::ceil(x)
                                : std::nearbyint(x);
  if (whole <= static_cast<S>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (whole >= static_cast<S>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(whole);
}
template <typename T>
T shift_left(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << by);
}
template <typename T>
T shift_right(T a, uint32_t by) {
  if (by >= 8 * sizeof(T)) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> by);
}
inline uint32_t funnel(const char* mode, uint32_t low, uint32_t high, uint32_t by) {
  by = mode[1] == 'w' ? by & 31 : std::min(by, 32u);
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<uint32_t>(mode[0] == 'l' ? both << by >> 32 : both >> by);
}
template <typename T>
T field(T a, uint32_t from, uint32_t count) {
  from &= 255, count &= 255;
  const T shifted = shift_right(a, from);
  return count >= 8 * sizeof(T) ? shifted : static_cast<T>(shifted & ((T{1} << count) - 1));
}
template <typename T>
T insert(T a, T b, uint32_t from, uint32_t count) {
  from &= 255, count &= 255;
  if (from >= 8 * sizeof(T)) return b;
  const T mask = static_cast<T>((count >= 8 * sizeof(T) ? ~T{0} : static_cast<T>((T{1} << count) - 1)) << from);
  return static_cast<T>((b & ~mask) | (static_cast<T>(a << from) & mask));
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = select >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
template <typename T>
T reverse(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
  return result;
}
inline uint32_t find(uint32_t zeros, uint32_t bits, bool shift) {
  return zeros == bits ? ~0u : shift ? zeros : bits - 1 - zeros;
}
template <typename T>
T add(T a, T b, bool carry, bool* out) {
  const auto sum = static_cast<unsigned __int128>(a) + b + carry;
  if (out) *out = sum >> (8 * sizeof(T)) & 1;
  return static_cast<T>(sum);
}
template <typename T>
T subtract(T a, T b, bool borrow, bool* out) {
  const auto difference = static_cast<unsigned __int128>(a) - b - borrow;
  if (out) *out = difference >> (8 * sizeof(T)) & 1;
  return static_cast<T>(difference);
}

}  // namespace ptx
