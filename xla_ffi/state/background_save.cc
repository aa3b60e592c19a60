// See background_save.h. Buffers go round: those that were written are filled again, so the copy is
// as large as the disk is late, and not as large as the arrays.
#include "state/background_save.h"

#include <unistd.h>

#include <algorithm>

#include "base/faults.h"
#include "base/threads.h"
#include "memory/preflight.h"

namespace paged_optax {

BackgroundSave::BackgroundSave(const std::string& path, std::vector<SavedArray> arrays,
                               int64_t max_bytes)
    : saver_(path, std::move(arrays)),
      max_buffers_(std::max(max_bytes / kDiskPiece, NumDiskThreads())),
      min_available_(max_bytes / 2),
      process_(getpid()) {
  const int64_t count = saver_.num_pieces();
  try {
    while (static_cast<int64_t>(writers_.size()) < std::min(count, NumDiskThreads())) {
      if (PAGED_FAILS("thread")) break;
      writers_.emplace_back([this] { WriteAll(); });
    }
  } catch (const std::exception&) {  // the machine has no more threads: fewer do
  }
  try {
    ForEachInParallel(
        count, NumDiskThreads(), [] { return 0; }, [&](int64_t piece, int) { Read(piece); });
  } catch (...) {
    Fail();
    Join();
    throw;
  }
  Close();
  saver_.EndReading();
}

BackgroundSave::~BackgroundSave() {
  Fail();
  Join();
}

bool BackgroundSave::is_here() const { return getpid() == process_; }

std::vector<uint32_t> BackgroundSave::Finish() {
  Join();
  if (failure_ != nullptr) std::rethrow_exception(failure_);
  return saver_.Sums();
}

void BackgroundSave::Read(int64_t piece) {
  DiskBuffer buffer = TakeBuffer();
  saver_.Read(piece, buffer);
  if (writers_.empty()) {  // there was no thread
    saver_.Write(piece, buffer);
    const std::lock_guard<std::mutex> lock(mutex_);
    unused_.push_back(std::move(buffer));
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  pieces_.emplace_back(piece, std::move(buffer));
  changed_.notify_all();
}

// Others may take host memory too while the copy grows.
bool BackgroundSave::MayGrow() const {
  if (num_buffers_ < NumDiskThreads()) return true;
  return num_buffers_ < max_buffers_ && AvailableHostBytes() >= min_available_;
}

DiskBuffer BackgroundSave::TakeBuffer() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return failure_ != nullptr || !unused_.empty() || MayGrow(); });
  if (failure_ != nullptr) std::rethrow_exception(failure_);
  DiskBuffer buffer;
  if (unused_.empty()) {
    ++num_buffers_;
  } else {
    buffer = std::move(unused_.back());
    unused_.pop_back();
  }
  return buffer;
}

// One thread of several.
void BackgroundSave::WriteAll() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return failure_ != nullptr || !pieces_.empty() || is_closed_; });
    if (failure_ != nullptr || pieces_.empty()) return;
    auto [piece, buffer] = std::move(pieces_.front());
    pieces_.pop_front();
    lock.unlock();
    try {
      saver_.Write(piece, buffer);
    } catch (...) {
      Fail();
      return;
    }
    lock.lock();
    if (is_closed_) {
      buffer = DiskBuffer();  // nobody fills it any more
    } else {
      unused_.push_back(std::move(buffer));
      changed_.notify_all();
    }
  }
}

// For the exception at hand, or without one because nobody wants the file any more.
void BackgroundSave::Fail() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_ == nullptr) {
    failure_ = std::current_exception();
    if (failure_ == nullptr) failure_ = std::make_exception_ptr(std::exception());
  }
  pieces_.clear();
  changed_.notify_all();
}

void BackgroundSave::Close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_closed_ = true;
  unused_.clear();
  changed_.notify_all();
}

void BackgroundSave::Join() {
  for (std::thread& writer : writers_) writer.join();
  writers_.clear();
}

}  // namespace paged_optax
