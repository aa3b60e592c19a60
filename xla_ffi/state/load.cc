// See load.h. As in save.cc, what a thread reads at once has one size, whatever arrays it holds.
#include "state/load.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "base/crc32.h"
#include "base/disk_file.h"
#include "base/threads.h"

namespace paged_optax {
namespace {

constexpr int64_t kBufferBytes = kDiskPiece + 16 * kDiskPage;

int64_t PageAfter(int64_t nbytes) { return (nbytes + kDiskPage - 1) / kDiskPage * kDiskPage; }

// Spans that follow each other in a file, or one in memory.
struct Run {
  DataReader reader;  // of the first span
  int64_t begin;      // in its array
  int64_t nbytes;
  int64_t pages;  // where they begin in the buffer
};

// What a thread reads at once.
struct Batch {
  std::vector<Run> runs;
  size_t first_item;
  size_t num_items;
  size_t first_span;            // of all items
  std::vector<int64_t> places;  // of the spans, in the buffer
  int64_t end = 0;
};

class Loader {
 public:
  explicit Loader(const std::vector<LoadItem>& items) : items_(items) {
    for (size_t i = 0; i < items.size(); ++i) {
      if (batches_.empty() || !Add(i, batches_.back())) {
        batches_.push_back({{}, i, 0, num_spans_, {}});
        Add(i, batches_.back());
      }
      num_spans_ += items[i].spans.size();
    }
    sums_.resize(num_spans_);
  }

  int64_t num_batches() const { return static_cast<int64_t>(batches_.size()); }
  // What every batch has room in.
  int64_t buffer_bytes() const {
    int64_t most = kDiskPage;
    for (const Batch& batch : batches_) most = std::max(most, PageAfter(batch.end));
    return most;
  }

  void Load(int64_t number, uint8_t* buffer) {
    const Batch& batch = batches_[number];
    DiskBuffer none;
    for (const Run& run : batch.runs) {
      if (run.reader.file() == nullptr) {
        run.reader.Read(run.begin, run.nbytes, buffer + run.pages, none);
      } else {
        run.reader.ReadPages(run.begin, run.nbytes, buffer + run.pages);
      }
    }
    size_t span = 0;
    std::vector<uint8_t*> bytes;
    for (size_t i = batch.first_item; i < batch.first_item + batch.num_items; ++i) {
      bytes.clear();
      for (const Span& each : items_[i].spans) {
        uint8_t* const found = buffer + batch.places[span];
        if (each.data->crc) sums_[batch.first_span + span] = Crc32(0, found, each.nbytes);
        bytes.push_back(found);
        ++span;
      }
      items_[i].use(bytes);
    }
  }

  // After all batches.
  void Check() const {
    std::map<const Data*, uint32_t> crcs;
    size_t span = 0;
    for (const LoadItem& item : items_) {
      for (const Span& each : item.spans) {
        uint32_t& crc = crcs.emplace(each.data, 0).first->second;
        crc = JoinCrc32(crc, sums_[span++], each.nbytes);
      }
    }
    for (const auto& [data, crc] : crcs) CheckSum(*data, crc);
  }

 private:
  // Puts an item at the end of a batch, if there is room.
  bool Add(size_t number, Batch& batch) {
    int64_t most = 0;
    for (const Span& span : items_[number].spans) most += span.nbytes + 2 * kDiskPage;
    if (batch.num_items != 0 && batch.end + most > kBufferBytes) return false;
    ++batch.num_items;
    for (const Span& span : items_[number].spans) {
      AddSpan(span, items_[number].is_read_once, batch);
    }
    return true;
  }

  void AddSpan(const Span& span, bool is_read_once, Batch& batch) {
    const auto file = FileOf(*span.data, is_read_once);
    const int64_t offset = file == nullptr ? 0 : span.data->offset + span.begin;
    const DataReader reader(*span.data, file);  // throws if the file is too short
    if (file != nullptr && !batch.runs.empty() && batch.runs.back().reader.file() == file &&
        end_in_file_ == offset) {
      batch.runs.back().nbytes += span.nbytes;
    } else {
      batch.end = PageAfter(batch.end);
      batch.runs.push_back({reader, span.begin, span.nbytes, batch.end});
      batch.end += offset % kDiskPage;
    }
    end_in_file_ = offset + span.nbytes;
    batch.places.push_back(batch.end);
    batch.end += span.nbytes;
  }

  std::shared_ptr<const InputFile> FileOf(const Data& data, bool is_read_once) {
    if (data.bytes != nullptr || data.nbytes == 0) return nullptr;
    std::shared_ptr<const InputFile>& file = files_[{data.path, is_read_once}];
    if (file == nullptr) file = DataReader(data, is_read_once).file();
    return file;
  }

  const std::vector<LoadItem>& items_;
  std::map<std::pair<std::string, bool>, std::shared_ptr<const InputFile>> files_;
  std::vector<Batch> batches_;
  size_t num_spans_ = 0;
  int64_t end_in_file_ = 0;     // of the last span
  std::vector<uint32_t> sums_;  // of all spans
};

}  // namespace

void LoadItems(const std::vector<LoadItem>& items, const Memory& target) {
  struct Buffer {
    std::shared_ptr<DiskBuffer> pages = std::make_shared<DiskBuffer>();
    std::shared_ptr<const void> pinned;
  };
  Loader loader(items);
  const int64_t nbytes = loader.buffer_bytes();
  ForEachInParallel(
      loader.num_batches(), NumDiskThreads(),
      [&] {
        auto buffer = std::make_unique<Buffer>();
        buffer->pinned = target.Pin({buffer->pages, buffer->pages->Reserve(nbytes)}, nbytes);
        return buffer;
      },
      [&](int64_t i, const std::unique_ptr<Buffer>& buffer) {
        loader.Load(i, buffer->pages->Reserve(nbytes));
      });
  loader.Check();
}

}  // namespace paged_optax
