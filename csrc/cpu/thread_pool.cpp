#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace dimap::cpu {
namespace {

constexpr auto kPause = std::chrono::milliseconds(100);

int processors() {
  if (const char* text = std::getenv("OMP_NUM_THREADS"))
    if (const int n = std::atoi(text); n > 0) return n;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

ThreadPool::ThreadPool(int workers, Watch watch)
    : workers_(workers > 0 ? workers : processors() + 1), watch_(std::move(watch)) {}

void ThreadPool::begin(const char* step, int64_t bytes) const {
  step_ = step, bytes_ = bytes;
  done_.store(0, std::memory_order_relaxed);
  look();
}

void ThreadPool::run(const std::function<void(int)>& body) const {
  std::mutex lock;
  std::condition_variable done;
  int left = workers_;
  std::vector<std::thread> threads;
  std::exception_ptr failure;
  try {
    for (int worker = 0; worker < workers_; ++worker) {
      threads.emplace_back([&, worker] {
        body(worker);
        const std::lock_guard guard(lock);
        if (--left == 0) done.notify_one();
      });
    }
    std::unique_lock guard(lock);
    while (!done.wait_for(guard, kPause, [&] { return left == 0; })) {
      guard.unlock();
      look();
      guard.lock();
    }
  } catch (...) {
    stopped_.store(true, std::memory_order_relaxed);
    failure = std::current_exception();
  }
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace dimap::cpu
