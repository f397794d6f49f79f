// Runs translated PTX on the emulator, and keeps the shadows that its checks look at.
#include "ptx.h"

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "cuda_runtime_api.h"

namespace ptx {

int planted_site = -1;

namespace {

constexpr uint32_t kRegisterFile = 65536, kThreadsOfProcessor = 2048, kSharedOfProcessor = 233472;  // of sm_90
constexpr uint32_t kSharedOfBlock = 49152, kMostShared = 232448;
constexpr uint32_t kMostParameters = 32764;

std::mutex mutex;  // of what follows
std::map<std::string, long> found;
std::unordered_map<uint64_t, Clock> told;          // by the words that blocks talk through
std::unordered_map<uint64_t, uint32_t> told_when;  // and after how many loads
std::map<std::string, uint32_t> loads;             // of the last launch of each kernel, dependent ones
std::string joined;

struct Known {
  const Entry* entry;
  uint32_t registers;
};
std::map<void*, Known> kernels;
std::map<void*, uint32_t> allowed;  // dynamic shared memory that was asked for
uint32_t launches = 0;
alignas(16) uint32_t barrier_word[16];

// Shared memory, byte by byte: which threads have touched it since the last barrier.
struct SharedCell {
  uint32_t set;      // the block in whose run it was written last
  uint32_t barrier;  // of the block; what follows is since then
  uint16_t barred;   // the warp's barriers, where one warp alone has touched it
  int16_t warp;      // or kMany
  int16_t writer, reader, atomic;
};
constexpr int16_t kNobody = -1, kMany = -2;

// The block that this thread of the system runs.
struct Block {
  uint32_t run = 0;
  Clock clock;
  std::vector<char> shared;
  std::vector<SharedCell> cells;
};
thread_local Block block;
thread_local uint32_t random_state = 12345;

// Global memory, byte by byte: who wrote it last. A table of regions, each mapped when it is first touched.
struct GlobalCell {
  uint32_t launch;  // 0: before all; kUnset: nobody since it was allocated
  uint16_t block;
  uint16_t thread;
  uint32_t clock;         // of the block
  uint32_t barrier : 20;  // of the block
  uint32_t barred : 11;   // of the warp
  uint32_t is_atomic : 1;
};
static_assert(sizeof(GlobalCell) == 16);
constexpr uint32_t kUnset = ~0u;
constexpr int kRegionBits = 28;
std::array<std::atomic<GlobalCell*>, (size_t{1} << (48 - kRegionBits))> regions;

GlobalCell* cells_of(uint64_t at) {
  auto& region = regions[at >> kRegionBits & (regions.size() - 1)];
  GlobalCell* cells = region.load(std::memory_order_acquire);
  if (cells == nullptr) {
    const size_t bytes = sizeof(GlobalCell) << kRegionBits;
    void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) std::abort();
    if (region.compare_exchange_strong(cells, static_cast<GlobalCell*>(fresh)))
      cells = static_cast<GlobalCell*>(fresh);
    else
      munmap(fresh, bytes);
  }
  return cells + (at & ((uint64_t{1} << kRegionBits) - 1));
}

void join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

Clock publish() {
  Clock now = block.clock;
  ++block.clock[blockIdx.x];
  return now;
}

void start_block(const Entry& entry, uint32_t dynamic) {
  block.run = emulator::runs;
  block.clock.assign(gridDim.x, 0);
  block.clock[blockIdx.x] = 1;
  const size_t bytes = (entry.shared + 15) / 16 * 16 + dynamic;
  if (block.shared.size() < bytes) block.shared.resize(bytes);
  if (block.cells.size() < bytes) block.cells.resize(bytes);
}

uint32_t resident_blocks(const Known& known, uint32_t threads, size_t dynamic) {
  const uint32_t registers =
      (known.registers * 32 + 255) / 256 * 256 * ((threads + 31) / 32);  // by warp, in units of 256
  const size_t shared = known.entry->shared + dynamic + 1024;
  const uint32_t by_registers = registers ? kRegisterFile / registers : 32;
  return std::min({by_registers, kThreadsOfProcessor / threads, static_cast<uint32_t>(kSharedOfProcessor / shared)});
}

}  // namespace

void report(const Thread& t, const char* where, const char* what) {
  const std::lock_guard lock(mutex);
  ++found[std::string(t.kernel) + ", " + where + ": " + what];
}

void fail(const Thread& t, const char* where, const char* what) {
  std::fprintf(stderr, "%s, %s: %s\n", t.kernel, where, what);
  std::abort();
}

void may_yield() {
  if (!dimap_ptx_preempts) return;
  random_state = random_state * 1664525u + 1013904223u;
  if (random_state >> 24 < 6) emulator::yield();
}

void pause() {
  std::this_thread::yield();
  emulator::yield();
}

namespace {
void reach(Thread& t) {  // the loads of whoever comes last count
  uint32_t& latest = emulator::latest[emulator::barriers % 2];
  latest = std::max(latest, t.now);
}
}  // namespace

void block_barrier(Thread& t) {
  reach(t);
  const uint32_t turn = emulator::barriers % 2;
  emulator::wait(emulator::Wait::kBlock);
  t.now = emulator::latest[turn];
}

bool any_in_block(Thread& t, bool mine) {
  const bool any = emulator::any_in_block(mine);
  block_barrier(t);
  return any;
}

void warp_barrier(Thread& t, uint32_t lanes) {
  if (lanes != 0xFFFFFFFFu) report(t, "a warp's barrier", "not of all lanes");
  emulator::exchange_in_warp(0);
  ++t.barred;
}

void fence(Thread& t) {
  t.fenced = publish();
  if (!t.heard.empty()) join(block.clock, t.heard);
}

void tell(Thread& t, uint64_t at, bool release) {
  if (!release && t.fenced.empty()) return;
  const Clock now = release ? publish() : t.fenced;
  const std::lock_guard lock(mutex);
  join(told[at], now);
  told_when[at] = std::max(told_when[at], t.now);
}

void hear(Thread& t, uint64_t at, bool acquire) {
  const std::lock_guard lock(mutex);
  const auto clock = told.find(at);
  if (clock == told.end()) return;
  join(acquire ? block.clock : t.heard, clock->second);
  t.now = std::max(t.now, told_when[at] + 1);
}

uint32_t grid_barrier_high() { return static_cast<uint32_t>(reinterpret_cast<uint64_t>(barrier_word) >> 32); }
uint32_t grid_barrier_low() { return static_cast<uint32_t>(reinterpret_cast<uint64_t>(barrier_word)); }

char* shared_memory() { return block.shared.data(); }

void touch_shared(Thread& t, const char* where, uint32_t at, uint32_t bytes, Access access) {
  if (at + bytes > block.shared.size()) fail(t, where, "beyond shared memory");
  const auto me = static_cast<int16_t>(threadIdx.x), warp = static_cast<int16_t>(threadIdx.x / 32);
  for (uint32_t i = at; i < at + bytes; ++i) {
    SharedCell& c = block.cells[i];
    const bool ordered = c.warp == warp && c.barred != static_cast<uint16_t>(t.barred);
    if (c.barrier != emulator::barriers || ordered) {
      c.barrier = emulator::barriers;
      c.warp = kNobody;
      c.writer = c.reader = c.atomic = kNobody;
    }
    const auto other = [me](int16_t who) { return who != kNobody && who != me; };
    const char* race = nullptr;
    if (access == Access::kRead && (other(c.writer) || other(c.atomic)))
      race = "race on shared memory: read what another thread writes";
    if (access == Access::kWrite && (other(c.writer) || other(c.reader) || other(c.atomic)))
      race = "race on shared memory: written where another thread reads or writes";
    if (access == Access::kAtomic && (other(c.writer) || other(c.reader)))
      race = "race on shared memory: an atomic where another thread reads or writes";
    if (access != Access::kWrite && c.set != block.run) race = "shared memory that nobody has written";
    if (race) report(t, where, race);
    if (access != Access::kRead) c.set = block.run;
    c.barred = static_cast<uint16_t>(t.barred);
    c.warp = c.warp == kNobody || c.warp == warp ? warp : kMany;
    int16_t& who = access == Access::kRead ? c.reader : access == Access::kWrite ? c.writer : c.atomic;
    who = who == kNobody || who == me ? me : kMany;
  }
}

namespace {
// Blocks of a cooperative grid look at one cell at the same time: it is in order for one of them only.
class Locked {
 public:
  explicit Locked(uint64_t at) : flag_(flags[at / 64 % flags.size()]) {
    while (flag_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  ~Locked() { flag_.clear(std::memory_order_release); }

 private:
  static std::array<std::atomic_flag, 1024> flags;
  std::atomic_flag& flag_;
};
std::array<std::atomic_flag, 1024> Locked::flags;
}  // namespace

void touch_global(Thread& t, const char* where, uint64_t at, uint32_t bytes, Access access) {
  GlobalCell* cells = cells_of(at);
  const Locked lock(at);
  const auto me = static_cast<uint16_t>(threadIdx.x), here = static_cast<uint16_t>(blockIdx.x);
  for (uint32_t i = 0; i < bytes; ++i) {
    GlobalCell& c = cells[i];
    if (c.launch == kUnset) {
      if (access != Access::kWrite) report(t, where, "memory that nobody has written");
    } else if (c.launch == launches && !(access == Access::kAtomic && c.is_atomic)) {
      if (c.block != here) {
        if (c.block >= block.clock.size() || block.clock[c.block] < c.clock)
          report(t, where, "what another block wrote, with no grid barrier or fence in between");
      } else if (c.thread != me && c.barrier == (emulator::barriers & 0xFFFFF)) {
        if (c.thread / 32 != me / 32 || c.barred == (t.barred & 0x7FF))
          report(t, where, "what another thread of the block wrote, with no barrier in between");
      }
    }
    if (access != Access::kRead)
      c = {launches,
           here,
           me,
           block.clock[here],
           emulator::barriers & 0xFFFFF,
           t.barred & 0x7FF,
           access == Access::kAtomic};
  }
}

}  // namespace ptx

namespace emulator {

namespace {
std::vector<std::pair<const void*, size_t>> marked;
}

void mark(const void* memory, size_t bytes, bool unset) {
  if (!dimap_emulated_ptx) return;
  if (unset) marked.emplace_back(memory, bytes);
  ptx::GlobalCell* cells = ptx::cells_of(reinterpret_cast<uint64_t>(memory));
  for (size_t i = 0; i < bytes; ++i) cells[i].launch = unset ? ptx::kUnset : 0;
}

void forget_marks() {
  for (const auto& [memory, bytes] : std::exchange(marked, {})) mark(memory, bytes, false);
}

int resident(void* kernel, unsigned threads, size_t dynamic) {
  const auto known = ptx::kernels.find(kernel);
  if (!dimap_emulated_ptx || known == ptx::kernels.end()) return 1;
  return static_cast<int>(std::min(1u, ptx::resident_blocks(known->second, threads, dynamic)));
}

void allow_shared(void* kernel, int bytes) { ptx::allowed[kernel] = static_cast<uint32_t>(bytes); }

cudaError_t launch_any(const cudaLaunchConfig_t& config, void* kernel, const std::function<void()>& source,
                       const char* parameters, size_t bytes) {
  using namespace ptx;
  if (!dimap_emulated_ptx) return launch(config, source);
  const auto known = kernels.find(kernel);
  if (known == kernels.end()) return std::fprintf(stderr, "a kernel without PTX\n"), cudaErrorUnknown;
  const Entry& entry = *known->second.entry;
  const auto dynamic = static_cast<uint32_t>(config.dynamicSmemBytes);
  const uint32_t fit = resident_blocks(known->second, config.blockDim.x, dynamic);
  const uint32_t shared = entry.shared + dynamic;
  const char* limit =
      bytes > kMostParameters                                ? "launch: more bytes of arguments than a kernel takes"
      : config.blockDim.x > entry.threads                    ? "launch: more threads than the kernel was compiled for"
      : shared > kMostShared                                 ? "launch: more shared memory than there is"
      : shared > kSharedOfBlock && dynamic > allowed[kernel] ? "launch: more shared memory than was asked for"
      : fit == 0 ? "launch: more registers or shared memory than a multiprocessor has"
      : config.numAttrs && config.gridDim.x > fit * kProcessors ? "launch: more blocks than are resident"
                                                                : nullptr;
  if (limit) return report({entry.key, 0, 0, 0, {}, {}}, "host", limit), cudaErrorUnknown;
  ++launches;
  told.clear();
  told_when.clear();
  std::memset(barrier_word, 0, sizeof barrier_word);
  loads[entry.key] = 0;
  return launch(config, [&] {
    if (block.run != runs) start_block(entry, dynamic);
    Thread t{entry.key, (entry.shared + 15) / 16 * 16, 0, 0, {}, {}};
    entry.run(t, parameters);
    const std::lock_guard lock(mutex);
    loads[entry.key] = std::max(loads[entry.key], t.now);
  });
}

}  // namespace emulator

extern "C" {

int dimap_emulated_ptx = 0, dimap_ptx_preempts = 0;

// The PTX with this key is that of `kernel`, and takes so many registers a thread. False where there is none.
bool dimap_ptx_register(void* kernel, const char* key, unsigned registers) {
  for (const ptx::Entry* e = ptx::entries; e->key; ++e)
    if (std::strcmp(e->key, key) == 0) return ptx::kernels[kernel] = {e, registers}, true;
  return false;
}

// What was found since the last call: a line for each place.
const char* dimap_ptx_found() {
  const std::lock_guard lock(ptx::mutex);
  ptx::joined.clear();
  for (const auto& [what, count] : ptx::found) ptx::joined += what + " (" + std::to_string(count) + " times)\n";
  ptx::found.clear();
  return ptx::joined.c_str();
}

// Loads of global memory that waited for each other, in the last launch of a kernel whose key starts so.
unsigned dimap_ptx_loads(const char* key) {
  unsigned most = 0;
  for (const auto& [name, count] : ptx::loads)
    if (name.rfind(key, 0) == 0) most = std::max(most, count);
  return most;
}

void dimap_ptx_plant(int site) { ptx::planted_site = site; }
const char* dimap_ptx_seen() { return ptx::sites_seen; }
}
