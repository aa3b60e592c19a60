// See device_table.h.
#include "state/device_table.h"

#include <algorithm>

#include "base/cuda_check.h"

namespace paged_optax {

DeviceTable::DeviceTable(int ordinal) : ordinal(ordinal), mailbox(sizeof(Rejection)) {}

std::shared_ptr<Arena> DeviceTable::Find(int32_t handle) const {
  for (const auto& arena : arenas) {
    if (arena->header.handle == handle) return arena;
  }
  return nullptr;
}

void DeviceTable::Append(std::shared_ptr<Arena> arena) {
  const int64_t count = static_cast<int64_t>(arenas.size());
  if (count == capacity) {
    const int64_t grown = std::max<int64_t>(64, 2 * capacity);
    auto buffer = std::make_unique<DeviceBuffer>(grown * sizeof(Header));
    if (count > 0) {
      // Versions advance on the device, so the copy must come after every queued step.
      CUDA_CHECK(cudaDeviceSynchronize());
      CUDA_CHECK(cudaMemcpy(buffer->data(), headers(), count * sizeof(Header), cudaMemcpyDefault));
    }
    buffers.push_back(std::move(buffer));
    capacity = grown;
  }
  CUDA_CHECK(cudaMemcpy(headers() + count, &arena->header, sizeof(Header), cudaMemcpyDefault));
  // Such copies may return before they are done, and XLA's streams do not wait for this one.
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
  arenas.push_back(std::move(arena));
}

void DeviceTable::Remove(int32_t handle) {
  for (size_t i = 0; i < arenas.size(); ++i) {
    if (arenas[i]->header.handle != handle) continue;
    if (i + 1 < arenas.size()) {
      CUDA_CHECK(cudaMemcpy(headers() + i, headers() + arenas.size() - 1, sizeof(Header),
                            cudaMemcpyDefault));
      CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
      arenas[i] = arenas.back();
    }
    arenas.pop_back();
    return;
  }
}

Header DeviceTable::ReadHeader(int32_t handle) const {
  for (size_t i = 0; i < arenas.size(); ++i) {
    if (arenas[i]->header.handle != handle) continue;
    ScopedDevice scope(ordinal);
    Header header;
    CUDA_CHECK(cudaMemcpy(&header, headers() + i, sizeof(Header), cudaMemcpyDefault));
    return header;
  }
  Header absent{};
  absent.handle = handle;
  return absent;
}

bool DeviceTable::TakeRejection(Rejection* rejection) {
  volatile Rejection* report = static_cast<Rejection*>(mailbox.host());
  if (report->verdict == Verdict::kAccept) return false;
  rejection->token.handle = report->token.handle;
  rejection->token.version = report->token.version;
  rejection->version = report->version;
  rejection->fingerprint = report->fingerprint;
  rejection->verdict = report->verdict;
  report->verdict = Verdict::kAccept;
  return true;
}

}  // namespace paged_optax
