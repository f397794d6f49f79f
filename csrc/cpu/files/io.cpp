#include "cpu/files/io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

namespace dimap::cpu {
namespace {

constexpr int64_t kDirectFrom = int64_t{1} << 28;  // bytes of a file that is written past the page cache
constexpr int64_t kFlush = int64_t{1} << 27;       // bytes between two requests to bring a file to the disk

[[noreturn]] void fail(const File& file) { throw FileError(errno, file.path, std::strerror(errno)); }

int open_directly([[maybe_unused]] const File& file) {
#if defined(O_DIRECT)
  struct stat status;
  if (fstat(file.descriptor, &status) != 0 || status.st_size < kDirectFrom) return -1;
  return open(file.path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_DIRECT);  // not every file system knows it
#else
  return -1;
#endif
}

}  // namespace

void read_fully(const File& file, void* memory, int64_t bytes, int64_t at) {
  auto* to = static_cast<char*>(memory);
  while (bytes > 0) {
    const ssize_t got = pread(file.descriptor, to, static_cast<size_t>(bytes), at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(file);
    if (got == 0)
      throw FileError(EIO, file.path, "must not change while it is read, ended at byte " + std::to_string(at));
    to += got, at += got, bytes -= got;
  }
}

void write_fully(const File& file, const void* memory, int64_t bytes, int64_t at) {
  const auto* from = static_cast<const char*>(memory);
  while (bytes > 0) {
    const ssize_t put = pwrite(file.descriptor, from, static_cast<size_t>(bytes), at);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail(file);
    from += put, at += put, bytes -= put;
  }
}

Buffer::~Buffer() { std::free(memory_); }

char* Buffer::room(int64_t bytes) {
  if (bytes > size_) {
    std::free(memory_);
    size_ = (bytes + kPage - 1) / kPage * kPage;
    memory_ = static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(size_)));
    if (memory_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  return memory_;
}

Targets::Targets(std::vector<File> files) : files_(std::move(files)), unflushed_(files_.size()) {
  for (const File& file : files_) direct_.push_back(open_directly(file));
}

Targets::~Targets() {
  for (const int descriptor : direct_)
    if (descriptor >= 0) close(descriptor);
}

void Targets::write(int32_t number, const char* memory, int64_t bytes, int64_t at) {
  const File& file = files_[number];
  if (const int direct = direct_[number]; direct >= 0) {
    const int64_t first = (kPage - at % kPage) % kPage, last = bytes - (at + bytes) % kPage;
    if (last > first && reinterpret_cast<uintptr_t>(memory + first) % kPage == 0) {
      const ssize_t put = pwrite(direct, memory + first, static_cast<size_t>(last - first), at + first);
      if (put < 0 && errno != EINVAL && errno != EINTR) fail(file);  // EINVAL: this file system wants more alignment
      if (put == last - first) {
        write_fully(file, memory, first, at);
        write_fully(file, memory + last, bytes - last, at + last);
        return;
      }
    }
  }
  write_fully(file, memory, bytes, at);
#if defined(SYNC_FILE_RANGE_WRITE)
  if (unflushed_[number].fetch_add(bytes, std::memory_order_relaxed) + bytes >= kFlush) {
    unflushed_[number].store(0, std::memory_order_relaxed);
    sync_file_range(file.descriptor, 0, 0, SYNC_FILE_RANGE_WRITE);  // begin, do not wait
  }
#endif
}

}  // namespace dimap::cpu
