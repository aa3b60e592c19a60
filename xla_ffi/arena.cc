// See arena.h.
#include "arena.h"

#include <algorithm>
#include <random>
#include <sstream>

#include "status.h"

#if PAGED_OPTAX_CUDA
#include "cuda_check.h"
#endif

namespace paged_optax {
namespace {

constexpr size_t kRecent = 1024;  // executions that may be under way at once, with room to spare

std::string Name(DeviceId device) {
  return (device.platform == Platform::kCpu ? "cpu:" : "cuda:") + std::to_string(device.ordinal);
}

std::string ShapeText(const Layout::LeafInfo& leaf) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < leaf.dims.size(); ++i) {
    text << (i ? ", " : "") << leaf.dims[i] << (leaf.dims.size() == 1 ? "," : "");
  }
  text << ")";
  return text.str();
}

// The first difference between the leaves that moments were made for and those of a call.
std::string Difference(const Layout& moments, const Layout& call) {
  const auto ours = moments.Leaves(), theirs = call.Leaves();
  std::ostringstream text;
  if (ours.size() != theirs.size()) {
    text << "the moments belong to " << ours.size() << " leaves but the gradients have "
         << theirs.size();
  } else {
    for (size_t i = 0; i < ours.size(); ++i) {
      if (ours[i].dims != theirs[i].dims) {
        text << "the moments of leaf " << i << " have shape " << ShapeText(ours[i])
             << " but its gradient has shape " << ShapeText(theirs[i]);
        break;
      }
      if (ours[i].codec != theirs[i].codec) {
        text << "the moments of leaf " << i << " are stored "
             << (ours[i].codec == Codec::kDynamic ? "in 8 bits" : "as float32")
             << " but this step wants them "
             << (theirs[i].codec == Codec::kDynamic ? "in 8 bits" : "as float32");
        break;
      }
    }
  }
  if (text.str().empty()) {
    text << "the gradients have the shapes that the moments were made for, but other names or "
            "another "
            "structure";
  }
  text << " (was the model or the optimizer's `quantization` changed?). Make a new state with "
          "init(params). The moments were left as they were.";
  return text.str();
}

}  // namespace

int64_t Layout::Append(Codec codec, const int64_t* dims, int64_t rank) {
  words_.push_back(static_cast<int64_t>(codec));
  words_.push_back(rank);
  words_.insert(words_.end(), dims, dims + rank);
  int64_t size = 1;
  for (int64_t i = 0; i < rank; ++i) size *= dims[i];
  int64_t& blocks =
      codec == Codec::kDynamic ? extent_.num_dynamic_blocks : extent_.num_float32_blocks;
  const int64_t first_block = blocks;
  blocks += NumBlocks(size);
  if (blocks >= kMaxBlocks) {
    throw StatusError(
        StatusCode::kInvalidArgument,
        "a state of more than 10^12 elements on one device is not supported; shard it");
  }
  return first_block;
}

uint64_t Layout::Fingerprint() const {
  // FNV-1a over words, with a mix of the high bits.
  uint64_t hash = 0xcbf29ce484222325u ^ static_cast<uint64_t>(paths_);
  for (const int64_t word : words_) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3u;
    hash ^= hash >> 29;
  }
  return hash;
}

std::vector<Layout::LeafInfo> Layout::Leaves() const {
  std::vector<LeafInfo> leaves;
  int64_t blocks[2] = {0, 0};
  for (size_t i = 0; i < words_.size(); i += 2 + words_[i + 1]) {
    LeafInfo leaf;
    leaf.codec = static_cast<Codec>(words_[i]);
    leaf.dims.assign(words_.begin() + i + 2, words_.begin() + i + 2 + words_[i + 1]);
    leaf.size = 1;
    for (const int64_t dim : leaf.dims) leaf.size *= dim;
    int64_t& next = blocks[leaf.codec == Codec::kDynamic];
    leaf.first_block = next;
    next += NumBlocks(leaf.size);
    leaves.push_back(std::move(leaf));
  }
  return leaves;
}

Registry& Registry::Get() {
  static Registry* registry = new Registry();
  return *registry;
}

// Handles start at a random number, so that a token from another process, restored without its
// moments, is recognised instead of finding somebody else's.
Registry::Registry()
    : first_handle_(static_cast<int32_t>(std::random_device{}() % (1u << 30) + (1u << 20))),
      next_handle_(first_handle_) {}

int32_t Registry::IssueHandle(DeviceId device, int64_t run, int32_t seed) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Issue& issue : issues_) {
    if (issue.run == run && issue.seed == seed && issue.devices.insert(device).second) {
      return issue.handle;
    }
  }
  const int32_t handle = next_handle_++;
  issues_.push_back({run, seed, handle, {device}});
  if (issues_.size() > kRecent) issues_.pop_front();
  unused_.insert(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
  return handle;
}

bool Registry::IsFirstUse(int32_t handle, int64_t run) {
  if (unused_.count(handle)) return true;
  // Another device may have been first in the same execution.
  return std::any_of(bound_.begin(), bound_.end(), [&](const Bound& bound) {
    return bound.handle == handle && bound.run == run;
  });
}

void Registry::NoteBound(int32_t handle, int64_t run) {
  if (unused_.erase(handle) == 0) return;
  bound_.push_back({handle, run});
  if (bound_.size() > kRecent) bound_.pop_front();
  num_unused_ = static_cast<int64_t>(unused_.size());
}

void Registry::RememberLayout(const Layout& layout, uint64_t fingerprint) {
  std::lock_guard<std::mutex> lock(mutex_);
  layouts_.try_emplace(fingerprint, layout);
}

std::shared_ptr<Arena> Registry::Open(const Request& request, Token token) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_pair(request.device, token.handle);
    const auto found = cpu_arenas_.find(key);
    if (found != cpu_arenas_.end()) return found->second;
    if (token.version == 0 && IsFirstUse(token.handle, request.run)) {
      auto arena = std::make_shared<Arena>();
      arena->memory = Memory::Anonymous(std::max<int64_t>(1, request.layout->extent().NumBytes()));
      arena->device = request.device;
      arena->header = {token.handle, 0, request.fingerprint, arena->memory.data()};
      arena->layout = *request.layout;
      arena->tree = request.tree;
      cpu_arenas_.emplace(key, arena);
      NoteBound(token.handle, request.run);
      return arena;
    }
  }
  throw StatusError(StatusCode::kFailedPrecondition,
                    Explain(Verdict::kUnknown, request.device, token, 0, request.fingerprint));
}

std::shared_ptr<Arena> Registry::Find(DeviceId device, int32_t handle) {
  for (auto& arena : FindAll(handle)) {
    if (arena->device == device) return arena;
  }
  return nullptr;
}

std::vector<std::shared_ptr<Arena>> Registry::FindAll(int32_t handle) {
  std::vector<std::shared_ptr<Arena>> arenas;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, arena] : cpu_arenas_) {
      if (key.second == handle) arenas.push_back(arena);
    }
  }
#if PAGED_OPTAX_CUDA
  for (DeviceTable* table : Tables()) {
    std::lock_guard<std::mutex> lock(table->mutex);
    if (auto arena = table->Find(handle)) arenas.push_back(arena);
  }
#endif
  return arenas;
}

std::string Registry::Explain(Verdict verdict, DeviceId device, Token token, int32_t version,
                              uint64_t call_layout) {
  std::ostringstream text;
  text << "paged_optax: ";
  if (verdict == Verdict::kStale) {
    text << "this optimizer state is not the newest one: its moments were at version "
         << token.version << ", and a later step has since moved them to version " << version
         << ". The state was used twice: rolled back, forked into two, kept by jnp.where or "
            "optax.MultiSteps after its update had run, or a step was tried again. Moments change "
            "in "
            "place, so only the newest state can go on. Go on from that, or from a new "
            "init(params); choose whether to step with jax.lax.cond around tx.update, and to "
            "accumulate gradients, average them before tx.update. The moments were left as they "
            "were.";
    return text.str();
  }
  const auto arenas = FindAll(token.handle);
  std::lock_guard<std::mutex> lock(mutex_);
  if (verdict == Verdict::kOtherLayout) {
    const auto call = layouts_.find(call_layout);
    for (const auto& arena : arenas) {
      if (arena->device == device && call != layouts_.end()) {
        text << Difference(arena->layout, call->second);
        return text.str();
      }
    }
    text << "the gradients do not have the leaves that the moments were made for. Make a new state "
            "with init(params).";
    return text.str();
  }
  const bool issued_here = token.handle >= first_handle_ && token.handle < next_handle_;
  if (!arenas.empty()) {
    text << "the moments of this optimizer state are on " << Name(arenas[0]->device)
         << " but the step ran on " << Name(device)
         << ". Moments do not follow a token from device to device: run the step where the state "
            "was first used, or make a new state with init(params).";
  } else if (issued_here && unused_.count(token.handle)) {
    text << "this optimizer state claims version " << token.version
         << " but was never used. Use the state that init or update returned.";
  } else if (issued_here) {
    text << "the moments of this optimizer state were released. Make a new state with "
            "init(params).";
  } else {
    text << "the moments of this optimizer state are not in this process: the state was restored "
            "from a checkpoint, unpickled or sent here as a bare token, and a token carries no "
            "moments. Make a new state with init(params); parameters can be restored as usual.";
  }
  return text.str();
}

// Keeps steps from starting and waits for those under way.
std::unique_lock<std::mutex> Registry::LockContents(Arena& arena) {
#if PAGED_OPTAX_CUDA
  if (arena.device.platform == Platform::kCuda) {
    DeviceTable& table = Table(arena.device.ordinal);
    std::unique_lock<std::mutex> lock(table.mutex);
    ScopedDevice scope(table.ordinal);
    CUDA_CHECK(cudaDeviceSynchronize());
    return lock;
  }
#endif
  return std::unique_lock<std::mutex>(arena.mutex);
}

// Contents must be locked.
int32_t Registry::CurrentVersion(const Arena& arena) {
#if PAGED_OPTAX_CUDA
  if (arena.device.platform == Platform::kCuda) {
    return Table(arena.device.ordinal).ReadHeader(arena.header.handle).version;
  }
#endif
  return arena.header.version;
}

std::vector<ArenaReport> Registry::Describe(Token token) {
  ThrowIfRejected();
  std::vector<ArenaReport> reports;
  for (const auto& arena : FindAll(token.handle)) {
    const std::unique_lock<std::mutex> lock = LockContents(*arena);
    const int32_t version = CurrentVersion(*arena);
    reports.push_back({arena->device, version, arena->tree, arena->memory.placement(),
                       arena->memory.nbytes(), arena->layout.Leaves()});
  }
  if (reports.empty() && token.version != 0) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kUnknown, {Platform::kCpu, 0}, token, 0, 0));
  }
  return reports;
}

void Registry::Read(DeviceId device, Token token, int64_t offset, int64_t nbytes,
                    void* destination) {
  const std::shared_ptr<Arena> arena = Find(device, token.handle);
  if (arena == nullptr) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kUnknown, device, token, 0, 0));
  }
  if (offset < 0 || nbytes < 0 || offset + nbytes > arena->memory.nbytes()) {
    throw StatusError(StatusCode::kInvalidArgument, "read outside the arena");
  }
  // Held during the copy: no step may start meanwhile.
  const std::unique_lock<std::mutex> lock = LockContents(*arena);
  const int32_t version = CurrentVersion(*arena);
  if (version != token.version) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kStale, device, token, version, 0));
  }
  arena->memory.Read(offset, nbytes, destination);
}

int64_t Registry::Release(int32_t handle) {
  int64_t nbytes = 0;
  std::vector<std::shared_ptr<Arena>> freed;
  for (const auto& arena : FindAll(handle)) {
#if PAGED_OPTAX_CUDA
    if (arena->device.platform == Platform::kCuda) {
      DeviceTable& table = Table(arena->device.ordinal);
      std::lock_guard<std::mutex> lock(table.mutex);
      ScopedDevice scope(table.ordinal);
      CUDA_CHECK(cudaDeviceSynchronize());
      table.Remove(handle);
    }
#endif
    nbytes += arena->memory.nbytes();
    freed.push_back(arena);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& arena : freed) cpu_arenas_.erase({arena->device, handle});
    unused_.erase(handle);
    num_unused_ = static_cast<int64_t>(unused_.size());
  }
  // A CPU step under way holds its own reference and the mutex: wait, so that the memory is really
  // gone on return.
  for (const auto& arena : freed) std::lock_guard<std::mutex> wait(arena->mutex);
  return nbytes;
}

int64_t Registry::NumArenas() {
  int64_t count = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    count = static_cast<int64_t>(cpu_arenas_.size());
  }
#if PAGED_OPTAX_CUDA
  for (DeviceTable* table : Tables()) {
    std::lock_guard<std::mutex> lock(table->mutex);
    count += static_cast<int64_t>(table->arenas.size());
  }
#endif
  return count;
}

int64_t Registry::NumUnused() { return num_unused_; }

#if PAGED_OPTAX_CUDA

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
  return {handle, 0, 0, nullptr};
}

bool DeviceTable::TakeRejection(Rejection* rejection) {
  volatile Rejection* report = static_cast<Rejection*>(mailbox.host());
  if (report->verdict == Verdict::kAccept) return false;
  rejection->token.handle = report->token.handle;
  rejection->token.version = report->token.version;
  rejection->version = report->version;
  rejection->layout = report->layout;
  rejection->verdict = report->verdict;
  report->verdict = Verdict::kAccept;
  return true;
}

DeviceTable& Registry::Table(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<DeviceTable>& table = tables_[ordinal];
  if (table == nullptr) {
    ScopedDevice scope(ordinal);
    table = std::make_unique<DeviceTable>(ordinal);
  }
  return *table;
}

bool Registry::MayBeFirstUse(int64_t run, const DeviceTable& table) {
  if (num_unused_ > 0) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(bound_.begin(), bound_.end(), [&](const Bound& bound) {
    return bound.run == run && table.Find(bound.handle) == nullptr;
  });
}

void Registry::BindOnFirstUse(const Request& request, Token token, DeviceTable& table,
                              void* stream) {
  if (token.version != 0 || table.Find(token.handle) != nullptr) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!IsFirstUse(token.handle, request.run)) return;
  }
  const int64_t nbytes =
      RoundUp(std::max<int64_t>(1, request.layout->extent().NumBytes()), kChunkBytes);
  const PlacementPolicy& policy = request.policy;
  int64_t resident = 0;
  for (const auto& arena : table.arenas) {
    if (arena->memory.placement() == Placement::kDevice) resident += arena->memory.nbytes();
  }
  const bool fits_device = nbytes + policy.headroom_bytes <= FreeDeviceBytes(table.ordinal);
  const bool fits_budget = policy.device_bytes < 0 || resident + nbytes <= policy.device_bytes;

  ScopedDevice scope(table.ordinal);
  auto arena = std::make_shared<Arena>();
  arena->memory =
      Memory::Managed(nbytes, table.ordinal,
                      fits_device && fits_budget ? Placement::kDevice : Placement::kHost, stream);
  arena->device = request.device;
  arena->header = {token.handle, 0, request.fingerprint, arena->memory.data()};
  arena->layout = *request.layout;
  arena->tree = request.tree;
  table.Append(arena);
  std::lock_guard<std::mutex> lock(mutex_);
  NoteBound(token.handle, request.run);
}

std::vector<DeviceTable*> Registry::Tables() {
  std::vector<DeviceTable*> tables;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [ordinal, table] : tables_) tables.push_back(table.get());
  return tables;
}

void Registry::ThrowIfRejected(DeviceTable& table) {
  Rejection rejection;
  {
    std::lock_guard<std::mutex> lock(table.mutex);
    if (!table.TakeRejection(&rejection)) return;
  }
  const DeviceId device{Platform::kCuda, table.ordinal};
  throw StatusError(
      StatusCode::kFailedPrecondition,
      Explain(rejection.verdict, device, rejection.token, rejection.version, rejection.layout) +
          " (An earlier step on " + Name(device) + " was refused and returned an update of zero.)");
}

void Registry::ThrowIfRejected() {
  for (DeviceTable* table : Tables()) ThrowIfRejected(*table);
}

#else

void Registry::ThrowIfRejected() {}

#endif  // PAGED_OPTAX_CUDA

}  // namespace paged_optax
