// Files read and written at any place, in full or not: what a system call leaves is asked for again.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/problem.h"

namespace dimap::cpu {

// What the system says when a file cannot be read or written.
struct FileError : std::runtime_error {
  FileError(int code, const std::string& path, const std::string& message)
      : std::runtime_error(message), code(code), path(path) {}
  int code;  // errno
  std::string path;
};

// Fills memory with the bytes of a file from `at` on. A file that ends before has changed since its header was read.
void read_fully(const File& file, void* memory, int64_t bytes, int64_t at);
void write_fully(const File& file, const void* memory, int64_t bytes, int64_t at);

constexpr int64_t kPage = 4096;  // what writing past the page cache aligns to

// Memory of a worker, aligned to a page, for one thing after the other.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  char* room(int64_t bytes);  // uninitialised; what was there before may be gone

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

// Files that are there in their full length, written at any place by any worker.
//
// Large files are written past the system's page cache where it knows how to: they would push everything else out of
// it, and would have to be copied and flushed later. The page at either end of a piece goes through the cache, as it
// may be another piece's too.
class Targets {
 public:
  explicit Targets(std::vector<File> files);
  ~Targets();
  Targets(const Targets&) = delete;
  Targets& operator=(const Targets&) = delete;

  // Memory that lies as far from a page's beginning as `at` does needs no copy.
  void write(int32_t file, const char* memory, int64_t bytes, int64_t at);

 private:
  std::vector<File> files_;
  std::vector<int> direct_;                      // [files] descriptors, -1: through the cache only
  std::vector<std::atomic<int64_t>> unflushed_;  // [files] bytes since the system was asked to begin writing
};

}  // namespace dimap::cpu
