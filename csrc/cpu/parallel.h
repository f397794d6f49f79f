// The thread pool as the kernels see it: somebody else's threads behind one function, and somebody who watches.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace dimap::cpu {

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int workers() const = 0;
  // Calls body(worker) once for each worker in [0, workers()), at the same time where it can; returns when all are
  // done. The body does not throw.
  virtual void run(const std::function<void(int)>& body) const = 0;

  // What is being done now, and how many bytes of it will be; then how many more are done, told by any worker.
  virtual void begin(const char* /*step*/, int64_t /*bytes*/) const {}
  virtual void advance(int64_t /*bytes*/) const {}
  // All that was begun is done.
  virtual void done() const {}
  // Whether to give up: `for_each` then takes no further items and `run` throws what the reason was.
  virtual bool stopped() const { return false; }

  // Calls body(i, worker) for every i in [0, n): workers take the next i when they are free. The first exception stops
  // the rest and is thrown again here: it need not cross somebody else's code.
  template <typename Body>
  void for_each(int64_t n, Body&& body) const {
    if (n <= 1 || workers() == 1) {
      for (int64_t i = 0; i < n; ++i) body(i, 0);
      done();
      return;
    }
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex lock;
    run([&](int worker) {
      try {
        for (int64_t i; !stopped() && (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i, worker);
      } catch (...) {
        next.store(n, std::memory_order_relaxed);
        const std::lock_guard guard(lock);
        if (!failure) failure = std::current_exception();
      }
    });
    if (failure) std::rethrow_exception(failure);
    done();
  }
};

}  // namespace dimap::cpu
