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
#include "rules/rules.h"
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

// The rules, in the order of their numbers.
py::list DescribeAllRules() {
  py::list rules;
  for (const RuleInfo& info : AllRules()) {
    py::list states, hyperparams;
    for (const StateInfo& state : info.states) {
      states.append(
          py::make_tuple(state.name, state.role == Role::kSigned ? "signed" : "nonnegative"));
    }
    for (const HyperparamInfo& hyperparam : info.hyperparams) {
      hyperparams.append(py::make_tuple(
          hyperparam.name, hyperparam.domain == Domain::kDecay ? "decay" : "nonnegative"));
    }
    py::dict rule;
    rule["name"] = info.name;
    rule["states"] = states;
    rule["hyperparams"] = hyperparams;
    rule["flags"] = info.flags;
    rules.append(rule);
  }
  return rules;
}

// The formats, in the order of their numbers.
py::list DescribeAllFormats() {
  py::list formats;
  for (const FormatInfo& info : kFormats) {
    py::dict format;
    format["name"] = info.name;
    format["code_bytes"] = info.code_bytes;
    format["words_per_state"] = info.words_per_state;
    format["is_random"] = info.is_random;
    formats.append(format);
  }
  return formats;
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
  const int64_t blocks = NumBlocks(leaf.size);
  const int64_t nbytes = report.extent.regions[leaf.format].shape.NumBytes() * report.num_slots;
  const int64_t resident =
      std::clamp<int64_t>(report.resident_blocks[leaf.format] - leaf.first_block, 0, blocks);
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
      leaves.append(py::make_tuple(kFormats[leaf.format].name, py::tuple(py::cast(leaf.dims))));
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

// Reads `part` of each of a leaf's blocks, which has `nbytes` in each of them, block after block.
template <class F>
void ReadBlocks(DeviceId device, Token token, const ArenaReport& report,
                const Signature::LeafInfo& leaf, int64_t nbytes, void* destination, F&& part) {
  const Region& region = report.extent.regions[leaf.format];
  const int64_t blocks = NumBlocks(leaf.size);
  for (int64_t done = 0, run; done < blocks; done += run) {
    const int64_t block = leaf.first_block + done;
    run = std::min(blocks - done, region.FirstInChunk(block, 1) - block);
    Registry::Get().Read(device, token, part(region.Locate(block)), run * nbytes,
                         static_cast<uint8_t*>(destination) + done * nbytes);
  }
}

template <class F>
auto WithLeaf(const std::string& platform, int ordinal, int32_t handle, int32_t version,
              size_t index, F&& body) {
  const DeviceId device = ParseDevice(platform, ordinal);
  const Token token{handle, version};
  for (const ArenaReport& report : Registry::Get().Describe(token)) {
    if (!(report.device == device) || index >= report.leaves.size()) continue;
    return body(device, token, report, report.leaves[index]);
  }
  throw StatusError(StatusCode::kInvalidArgument, "no such leaf on this device");
}

// The stored states of one leaf: the codes of each, then the words of each, blocks concatenated,
// padding included.
py::tuple ReadLeaf(const std::string& platform, int ordinal, int32_t handle, int32_t version,
                   size_t index) {
  return WithLeaf(
      platform, ordinal, handle, version, index,
      [](DeviceId device, Token token, const ArenaReport& report, const Signature::LeafInfo& leaf) {
        const BlockShape& shape = report.extent.regions[leaf.format].shape;
        const int64_t blocks = NumBlocks(leaf.size);
        const bool is_float = kFormats[leaf.format].code_bytes == 4;
        py::list parts;
        for (int32_t s = 0; s < shape.num_states; ++s) {
          py::array codes = is_float ? py::array(py::array_t<float>(blocks * kBlockSize))
                                     : py::array(py::array_t<uint8_t>(blocks * kBlockSize));
          ReadBlocks(device, token, report, leaf, shape.state_bytes, codes.mutable_data(),
                     [s](const BlockPlace& place) { return place.codes + s * place.state_stride; });
          parts.append(codes);
        }
        std::vector<float> words(blocks * shape.num_words);
        if (shape.num_words > 0) {
          ReadBlocks(device, token, report, leaf, shape.num_words * 4, words.data(),
                     [](const BlockPlace& place) { return place.words; });
        }
        for (int32_t w = 0; w < shape.num_words; ++w) {
          py::array_t<float> column(blocks);
          for (int64_t b = 0; b < blocks; ++b) {
            column.mutable_data()[b] = words[b * shape.num_words + w];
          }
          parts.append(column);
        }
        return py::tuple(parts);
      });
}

// The residuals of one leaf's parameters, blocks concatenated, padding included.
py::array_t<uint8_t> ReadResiduals(const std::string& platform, int ordinal, int32_t handle,
                                   int32_t version, size_t index) {
  return WithLeaf(
      platform, ordinal, handle, version, index,
      [](DeviceId device, Token token, const ArenaReport& report, const Signature::LeafInfo& leaf) {
        py::array_t<uint8_t> residuals(NumBlocks(leaf.size) * kResidualBytes);
        ReadBlocks(device, token, report, leaf, kResidualBytes, residuals.mutable_data(),
                   [](const BlockPlace& place) { return place.residuals; });
        return residuals;
      });
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
  module.def("update_attrs", &UpdateAttributes);
  module.def("rules", &DescribeAllRules);
  module.def("formats", &DescribeAllFormats);
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
