// The Python module: what paged_optax asks of the C++ side beside the calls in compiled programs.
// With hooks.cc the only file that includes Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "base/notice.h"
#include "base/status.h"
#include "memory/memory.h"
#include "memory/preflight.h"
#include "python/testing.h"
#include "state/registry.h"
#include "xla/handlers.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "memory/link.h"
#endif

#ifndef PAGED_OPTAX_CUDA_ARCHS
#define PAGED_OPTAX_CUDA_ARCHS ""
#endif
#ifndef PAGED_OPTAX_NVCC_VERSION
#define PAGED_OPTAX_NVCC_VERSION ""
#endif

namespace py = ::pybind11;

namespace paged_optax {
namespace {

py::list Targets() {
  py::list targets;
  for (const HandlerEntry& entry : Handlers()) {
    targets.append(py::make_tuple(entry.target, entry.platform, py::capsule(entry.handler)));
  }
  return targets;
}

py::dict BuildInfo() {
  py::dict info;
  info["version"] = PAGED_OPTAX_VERSION;
  info["ffi_api"] = FfiApiVersion();
#if PAGED_OPTAX_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["nvcc"] = PAGED_OPTAX_NVCC_VERSION;
  info["cuda_archs"] = PAGED_OPTAX_CUDA_ARCHS;
  return info;
}

// What the CUDA driver says of this machine; {"error": reason} where there is none to ask.
py::dict CudaInfo() {
  py::dict info;
#if PAGED_OPTAX_CUDA
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    info["error"] = "no NVIDIA driver was found";
    return info;
  }
  info["driver"] = driver;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    info["error"] = cudaGetErrorString(error);
    return info;
  }
  py::list devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
    py::dict device;
    device["name"] = std::string(properties.name);
    device["compute_capability"] = py::make_tuple(properties.major, properties.minor);
    device["total_bytes"] = static_cast<int64_t>(properties.totalGlobalMem);
    device["managed"] = properties.managedMemory != 0;
    device["concurrent_managed"] = properties.concurrentManagedAccess != 0;
    char bus[32] = "";
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof(bus), i));
    device["pci_bus_id"] = std::string(bus);
    devices.append(device);
  }
  info["devices"] = devices;
#else
  info["error"] = "this build has no CUDA code";
#endif
  return info;
}

int64_t FreeDeviceMemory(int ordinal) {
#if PAGED_OPTAX_CUDA
  return FreeDeviceBytes(ordinal);
#else
  (void)ordinal;
  throw StatusError(StatusCode::kFailedPrecondition, "this build has no CUDA code");
#endif
}

DeviceId ParseDevice(const std::string& platform, int ordinal) {
  return {platform == "cpu" ? Platform::kCpu : Platform::kCuda, ordinal};
}

// Bytes of a leaf's blocks, and of those that are resident.
std::pair<int64_t, int64_t> LeafBytes(const ArenaReport& report, const Signature::LeafInfo& leaf) {
  const bool is_dynamic = Is8Bit(leaf.codec);
  const int64_t first = leaf.first_block + (is_dynamic ? 0 : report.extent.num_quantized_blocks);
  const int64_t blocks = NumBlocks(leaf.size);
  const int64_t residual_bytes = report.extent.has_residuals ? kResidualBytes : 0;
  const int64_t nbytes =
      ((is_dynamic ? kQuantizedBlockBytes : kFloat32BlockBytes) + residual_bytes) *
      report.num_slots;
  const int64_t resident = std::clamp<int64_t>(report.resident_blocks - first, 0, blocks);
  return {blocks * nbytes, resident * nbytes};
}

py::list Describe(int32_t handle, int32_t version) {
  std::vector<ArenaReport> reports;
  {
    py::gil_scoped_release unlocked;
    reports = Registry::Get().Describe({handle, version});
  }
  py::list result;
  for (const ArenaReport& report : reports) {
    py::list leaves, leaf_bytes;
    for (const Signature::LeafInfo& leaf : report.leaves) {
      leaves.append(py::make_tuple(static_cast<int>(leaf.codec), py::tuple(py::cast(leaf.dims))));
      const auto [total, resident] = LeafBytes(report, leaf);
      leaf_bytes.append(py::make_tuple(total, resident));
    }
    py::dict item;
    item["platform"] = report.device.platform == Platform::kCpu ? "cpu" : "cuda";
    item["ordinal"] = report.device.ordinal;
    item["version"] = report.version;
    item["tree"] = report.tree;
    item["shards"] = report.shards;
    item["num_devices"] = report.num_devices;
    item["memory"] = Name(report.kind);
    item["total"] = report.nbytes;
    item["replay"] = report.nbytes / report.num_slots * (report.num_slots - 1);
    item["resident"] = report.resident_bytes;
    item["budget"] = report.budget;
    item["limit"] = report.residency.limit;
    item["moved"] = report.residency.moved_bytes;
    item["moving_seconds"] = report.residency.moving_seconds;
    item["leaves"] = leaves;
    item["leaf_bytes"] = leaf_bytes;
    result.append(item);
  }
  return result;
}

// The stored moments of one leaf: (mu, nu) float32, or (mu codes, nu codes, mu scales, nu scales),
// blocks concatenated, padding included.
py::tuple ReadLeaf(const std::string& platform, int ordinal, int32_t handle, int32_t version,
                   size_t index) {
  const DeviceId device = ParseDevice(platform, ordinal);
  const Token token{handle, version};
  Registry& registry = Registry::Get();
  std::vector<ArenaReport> reports;
  {
    py::gil_scoped_release unlocked;
    reports = registry.Describe(token);
  }
  for (const ArenaReport& report : reports) {
    if (!(report.device == device) || index >= report.leaves.size()) continue;
    const Signature::LeafInfo& leaf = report.leaves[index];
    const ArenaExtent& extent = report.extent;
    const int64_t blocks = NumBlocks(leaf.size);
    // Addresses relative to the arena, from the same arithmetic that the kernels use.
    const uint8_t* origin = nullptr;
    const auto offset = [](const void* address) {
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
    };
    const auto read = [&](const void* address, int64_t nbytes, void* destination) {
      py::gil_scoped_release unlocked;
      registry.Read(device, token, offset(address), nbytes, destination);
    };
    if (leaf.codec == Codec::kFloat32) {
      py::array_t<float> mu(blocks * kBlockSize), nu(blocks * kBlockSize);
      for (int64_t b = 0; b < blocks; ++b) {
        const auto block = extent.LocateFloat32(origin, leaf.first_block + b);
        read(block.mu, kBlockSize * 4, mu.mutable_data() + b * kBlockSize);
        read(block.nu, kBlockSize * 4, nu.mutable_data() + b * kBlockSize);
      }
      return py::make_tuple(mu, nu);
    }
    py::array_t<uint8_t> mu(blocks * kBlockSize), nu(blocks * kBlockSize);
    py::array_t<float> mu_scales(blocks), nu_scales(blocks);
    std::vector<float> scales;
    const int64_t per_chunk = extent.QuantizedBlocksPerChunk();
    for (int64_t b = 0, run; b < blocks; b += run) {
      run = std::min(blocks - b, per_chunk - (leaf.first_block + b) % per_chunk);
      const auto block = extent.LocateQuantized(origin, leaf.first_block + b);
      read(block.mu, run * kBlockSize, mu.mutable_data() + b * kBlockSize);
      read(block.nu, run * kBlockSize, nu.mutable_data() + b * kBlockSize);
      scales.resize(2 * run);
      read(block.scales, run * 8, scales.data());
      for (int64_t i = 0; i < run; ++i) {
        mu_scales.mutable_data()[b + i] = scales[2 * i];
        nu_scales.mutable_data()[b + i] = scales[2 * i + 1];
      }
    }
    return py::make_tuple(mu, nu, mu_scales, nu_scales);
  }
  throw StatusError(StatusCode::kInvalidArgument, "no such leaf on this device");
}

// The residuals of one leaf's parameters, blocks concatenated, padding included.
py::array_t<uint8_t> ReadResiduals(const std::string& platform, int ordinal, int32_t handle,
                                   int32_t version, size_t index) {
  const DeviceId device = ParseDevice(platform, ordinal);
  const Token token{handle, version};
  Registry& registry = Registry::Get();
  py::gil_scoped_release unlocked;
  for (const ArenaReport& report : registry.Describe(token)) {
    if (!(report.device == device) || index >= report.leaves.size()) continue;
    if (!report.extent.has_residuals) continue;
    const Signature::LeafInfo& leaf = report.leaves[index];
    const int64_t blocks = NumBlocks(leaf.size);
    std::vector<uint8_t> residuals(blocks * kResidualBytes);
    for (int64_t b = 0; b < blocks; ++b) {
      registry.Read(device, token, report.extent.ResidualOffset(leaf.codec, leaf.first_block + b),
                    kResidualBytes, residuals.data() + b * kResidualBytes);
    }
    py::gil_scoped_acquire locked;
    return py::array_t<uint8_t>(static_cast<py::ssize_t>(residuals.size()), residuals.data());
  }
  throw StatusError(StatusCode::kInvalidArgument, "no residuals of such a leaf on this device");
}

// Notices wait here until the interpreter's main thread passes by; posting one takes no GIL, since
// its holder may be waiting for the very lock that the poster has.
struct Notices {
  std::mutex mutex;
  std::deque<Notice> queue;
  PyObject* handler = nullptr;  // called with ordinal, missing_bytes, text
};

Notices& AllNotices() {
  static Notices* notices = new Notices();
  return *notices;
}

int DeliverNotices(void*) {
  Notices& notices = AllNotices();
  for (;;) {
    Notice notice;
    {
      std::lock_guard<std::mutex> lock(notices.mutex);
      if (notices.queue.empty() || notices.handler == nullptr) return 0;
      notice = std::move(notices.queue.front());
      notices.queue.pop_front();
    }
    try {
      py::handle(notices.handler)(notice.ordinal, notice.missing_bytes, notice.text);
    } catch (py::error_already_set& error) {
      // Where warnings are errors. This may be any place of the user's program: nothing to unwind.
      error.discard_as_unraisable("a notice of paged_optax");
    }
  }
}

}  // namespace

void PostNotice(Notice notice) {
  Notices& notices = AllNotices();
  {
    std::lock_guard<std::mutex> lock(notices.mutex);
    notices.queue.push_back(std::move(notice));
  }
  Py_AddPendingCall(&DeliverNotices, nullptr);
}

}  // namespace paged_optax

PYBIND11_MODULE(_ext, module) {
  using namespace paged_optax;
  module.doc() = "Handlers and registry of paged_optax; use the Python package, not this module.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const StatusError& error) {
      const bool memory = error.code() == StatusCode::kResourceExhausted;
      const bool argument = error.code() == StatusCode::kInvalidArgument;
      PyErr_SetString(memory     ? PyExc_MemoryError
                      : argument ? PyExc_ValueError
                                 : PyExc_RuntimeError,
                      error.what());
    }
  });
  module.def("targets", &Targets);
  module.def("build_info", &BuildInfo);
  module.def("cuda_info", &CudaInfo);
  module.def("free_device_bytes", &FreeDeviceMemory, py::arg("ordinal"));
  module.def("available_host_bytes", &AvailableHostBytes);
  module.def("check_host_memory", &CheckHostMemory);
  module.def("check_address_space", &CheckAddressSpace);
  module.def("describe", &Describe, py::arg("handle"), py::arg("version"));
  module.def("read_leaf", &ReadLeaf, py::arg("platform"), py::arg("ordinal"), py::arg("handle"),
             py::arg("version"), py::arg("leaf"));
  module.def("read_residuals", &ReadResiduals, py::arg("platform"), py::arg("ordinal"),
             py::arg("handle"), py::arg("version"), py::arg("leaf"));
  module.def(
      "release", [](int32_t handle) { return Registry::Get().Release(handle); }, py::arg("handle"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "release_all", [] { return Registry::Get().ReleaseAll(); },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "limit",
      [](int32_t handle, int32_t version, int64_t device_bytes) {
        return Registry::Get().Limit({handle, version}, device_bytes);
      },
      py::arg("handle"), py::arg("version"), py::arg("device_bytes"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "stop_pagers", [] { Registry::Get().StopPagers(); },
      py::call_guard<py::gil_scoped_release>());
  module.def("set_notice_handler", [](const py::object& handler) {
    std::lock_guard<std::mutex> lock(AllNotices().mutex);
    AllNotices().handler = py::object(handler).release().ptr();  // kept until the process ends
  });
  module.def("deliver_notices", [] { DeliverNotices(nullptr); });
#if PAGED_OPTAX_CUDA
  module.def(
      "measure_link",
      [](int ordinal, int64_t nbytes) {
        const LinkRates rates = MeasureLink(ordinal, nbytes);
        return std::make_tuple(rates.in, rates.out, rates.each_way);
      },
      py::arg("ordinal"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>());
#endif
  module.def(
      "raise_if_rejected", [] { Registry::Get().ThrowIfRejected(); },
      py::call_guard<py::gil_scoped_release>());
  module.def("set_shared_base", [](int32_t random) { Registry::Get().SetSharedBase(random); });
  AddTestHooks(module);
  module.def("num_arenas", [] { return Registry::Get().NumArenas(); });
  module.def("num_unused", [] { return Registry::Get().NumUnused(); });
}
