#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cuda_runtime_api.h"

constinit thread_local emulator::Index threadIdx{}, blockIdx{}, gridDim{}, blockDim{};

namespace emulator {

int dimap_emulated_host_calls = 0, dimap_emulated_host_bytes = 0, dimap_emulated_shared = 1 << 17;
thread_local uint32_t barriers = 1, runs = 0, latest[2] = {};

namespace {

constexpr size_t kStack = 1 << 19;  // a function of PTX has thousands of registers

struct Warp {
  uint64_t words[2][32];
};

}  // namespace

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned index = 0;
  bool started = false;
  Wait waits = Wait::kNone;
  unsigned exchanges = 0;  // in the warp, so far: every other one uses the other half
};

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated block %u: %s\n", blockIdx.x, what);
  std::abort();
}

class Block {
 public:
  explicit Block(unsigned count) : fibers_(count), warps_((count + 31) / 32), order_(count) {
    for (unsigned i = 0; i < count; ++i) order_[i] = fibers_[i].index = i;
  }

  void run(const std::function<void()>& kernel, std::barrier<>* grid_barrier) {
    kernel_ = &kernel;
    current_block = this;
    any_ = 0;
    ++barriers, ++runs;
    latest[0] = latest[1] = 0;
    for (Fiber& f : fibers_) f.started = false, f.waits = Wait::kNone, f.exchanges = 0;
    while (true) {
      std::shuffle(order_.begin(), order_.end(), random_);
      bool ran = false;
      for (const unsigned i : order_) {
        if (fibers_[i].waits != Wait::kNone) continue;
        resume(fibers_[i]);
        ran = true;
      }
      ran |= release_warps();
      if (ran) continue;
      if (all(Wait::kDone, Wait::kDone)) return;
      if (all(Wait::kBlock, Wait::kDone)) {
        latest[++barriers % 2] = 0;
        release(Wait::kBlock);
      } else if (grid_barrier && all(Wait::kGrid, Wait::kGrid)) {
        grid_barrier->arrive_and_wait();
        ++barriers;
        release(Wait::kGrid);
      } else {
        fail("threads wait for each other at different barriers");
      }
    }
  }

  void wait(Wait for_what) {
    Fiber* me = running_;
    me->waits = for_what;
    if (_setjmp(me->at) == 0) _longjmp(home_, 1);
  }
  void yield() {
    Fiber* me = running_;
    if (_setjmp(me->at) == 0) _longjmp(home_, 1);
  }
  const uint64_t* exchange(uint64_t mine) {
    Fiber* me = running_;
    uint64_t* words = warps_[me->index / 32].words[me->exchanges++ % 2];
    words[me->index % 32] = mine;
    wait(Wait::kWarp);
    return words;
  }
  int any(int mine) {
    any_ |= mine != 0;
    wait(Wait::kBlock);
    const int result = any_;
    wait(Wait::kBlock);
    any_ = 0;
    wait(Wait::kBlock);
    return result;
  }

  static thread_local Block* current_block;

 private:
  static void start() {
    Block* self = current_block;
    (*self->kernel_)();
    self->wait(Wait::kDone);
  }
  void resume(Fiber& f) {
    running_ = &f;
    threadIdx.x = f.index;
    if (_setjmp(home_)) return;
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Block::start, 0);
    setcontext(&f.context);
  }
  bool all(Wait a, Wait b) const {
    return std::all_of(fibers_.begin(), fibers_.end(), [&](const Fiber& f) { return f.waits == a || f.waits == b; });
  }
  void release(Wait which) {
    for (Fiber& f : fibers_)
      if (f.waits == which) f.waits = Wait::kNone;
  }
  bool release_warps() {
    bool any = false;
    for (size_t w = 0; w < warps_.size(); ++w) {
      const auto begin = fibers_.begin() + static_cast<std::ptrdiff_t>(32 * w);
      const auto end = std::min(begin + 32, fibers_.end());
      if (!std::all_of(begin, end, [](const Fiber& f) { return f.waits == Wait::kWarp; })) continue;
      for (auto f = begin; f != end; ++f) f->waits = Wait::kNone;
      any = true;
    }
    return any;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  std::mt19937 random_{1};
  jmp_buf home_;
  Fiber* running_ = nullptr;
  int any_ = 0;
};

thread_local Block* Block::current_block = nullptr;

// Blocks that no grid runs on: their stacks are kept.
class Spare {
 public:
  explicit Spare(unsigned threads) : threads_(threads) {
    const std::lock_guard lock(mutex_);
    auto& kept = kept_[threads];
    if (kept.empty()) {
      block_ = std::make_unique<Block>(threads);
    } else {
      block_ = std::move(kept.back());
      kept.pop_back();
    }
  }
  ~Spare() {
    const std::lock_guard lock(mutex_);
    kept_[threads_].push_back(std::move(block_));
  }
  Block& operator*() { return *block_; }

 private:
  static std::mutex mutex_;
  static std::map<unsigned, std::vector<std::unique_ptr<Block>>> kept_;
  unsigned threads_;
  std::unique_ptr<Block> block_;
};
std::mutex Spare::mutex_;
std::map<unsigned, std::vector<std::unique_ptr<Block>>> Spare::kept_;

void run_block(Block& fibers, unsigned index, const cudaLaunchConfig_t& config, const std::function<void()>& kernel,
               std::barrier<>* grid_barrier) {
  blockIdx.x = index;
  gridDim.x = config.gridDim.x;
  blockDim.x = config.blockDim.x;
  fibers.run(kernel, grid_barrier);
}

}  // namespace

void wait(Wait for_what) { Block::current_block->wait(for_what); }
const uint64_t* exchange_in_warp(uint64_t mine) { return Block::current_block->exchange(mine); }
void yield() { Block::current_block->yield(); }
int any_in_block(int mine) { return Block::current_block->any(mine); }

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const unsigned blocks = config.gridDim.x;
  if (config.numAttrs == 0) {
    Spare fibers(config.blockDim.x);
    for (unsigned b = blocks; b-- > 0;) run_block(*fibers, b, config, kernel, nullptr);  // any order must do
    return cudaSuccess;
  }
  if (blocks > kProcessors) return cudaErrorUnknown;
  std::barrier<> grid_barrier(blocks);
  std::vector<std::thread> running;
  for (unsigned b = 0; b < blocks; ++b)
    running.emplace_back([&, b] {
      Spare fibers(config.blockDim.x);
      run_block(*fibers, b, config, kernel, &grid_barrier);
    });
  for (std::thread& t : running) t.join();
  return cudaSuccess;
}

}  // namespace emulator
