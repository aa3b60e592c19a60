// Arrays on their way into a file while their owner goes on: they are written from a copy.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "state/save.h"

namespace paged_optax {

class BackgroundSave {
 public:
  // Reads all arrays before it returns, and has begun to write them: what is not on the disk then
  // is in memory. Pieces beyond `max_bytes`, or where less than half as much is left to the host,
  // wait until others are written. Throws as SaveArrays.
  BackgroundSave(const std::string& path, std::vector<SavedArray> arrays, int64_t max_bytes);
  BackgroundSave(const BackgroundSave&) = delete;
  // Ends what has not been written.
  ~BackgroundSave();

  // Waits until all is written. Returns and throws as SaveArrays; once.
  std::vector<uint32_t> Finish();

  // Whether this is the process that made it. A forked one has no threads to wait for.
  bool is_here() const;

 private:
  void Read(int64_t piece);
  void WriteAll();
  DiskBuffer TakeBuffer();
  bool MayGrow() const;
  void Fail();
  // No piece will come any more.
  void Close();
  void Join();

  Saver saver_;
  const int64_t max_buffers_;
  const int64_t min_available_;  // of the host
  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t num_buffers_ = 0;  // that exist
  std::vector<DiskBuffer> unused_;
  std::deque<std::pair<int64_t, DiskBuffer>> pieces_;  // that were read
  bool is_closed_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> writers_;
};

}  // namespace paged_optax
