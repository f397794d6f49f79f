// Threads of our own, for work that has no torch: files. The caller's thread waits, and looks up now and then.
#pragma once

#include <atomic>
#include <functional>

#include "cpu/parallel.h"

namespace dimap::cpu {

class ThreadPool final : public Pool {
 public:
  // What the caller's thread does ten times a second while it waits: step, bytes done and in all. An exception from it
  // ends the work and is thrown by what runs.
  using Watch = std::function<void(const char* step, int64_t done, int64_t bytes)>;

  // workers: 0: as many as OMP_NUM_THREADS says, or else as this process may use processors; and one more, since some
  // of them wait for a disk.
  explicit ThreadPool(int workers, Watch watch = {});

  int workers() const override { return workers_; }
  void run(const std::function<void(int)>& body) const override;
  void begin(const char* step, int64_t bytes) const override;
  void advance(int64_t bytes) const override { done_.fetch_add(bytes, std::memory_order_relaxed); }
  void done() const override { look(); }
  bool stopped() const override { return stopped_.load(std::memory_order_relaxed); }

 private:
  void look() const {
    if (watch_) watch_(step_, done_.load(std::memory_order_relaxed), bytes_);
  }

  int workers_;
  Watch watch_;
  mutable std::atomic<bool> stopped_{false};
  mutable std::atomic<int64_t> done_{0};
  mutable const char* step_ = "";
  mutable int64_t bytes_ = 0;
};

}  // namespace dimap::cpu
