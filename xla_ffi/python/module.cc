// The Python module: what paged_optax asks of the C++ side, apart from the calls in compiled
// programs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/faults.h"
#include "base/trace.h"
#include "memory/file_system.h"
#include "memory/gpus.h"
#include "memory/memory.h"
#include "memory/preflight.h"
#include "memory/promises.h"
#include "python/checkpoint.h"
#include "python/errors.h"
#include "python/internals.h"
#include "python/interpreter.h"
#include "python/notices.h"
#include "rules/rules.h"
#include "state/contents.h"
#include "state/forecast.h"
#include "state/registry.h"
#include "step/leaf.h"
#include "xla/handlers.h"

#if PAGED_OPTAX_CUDA
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

constexpr char kStateRefusedDoc[] =
    "An optimizer state was refused, by a step or by a question about it.\n\n"
    "The step changed nothing: its update is zero, and the moments are as they were. The text "
    "says\n"
    "why, and what to do. docs/refused.md says where and when it is raised.";

#if PAGED_OPTAX_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

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
  info["cuda"] = kHasCuda;
  info["nvtx"] = PAGED_OPTAX_NVTX == 1;
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
          py::make_tuple(state.name, state.role == Role::kNonNegative ? "nonnegative" : "signed"));
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
    format["stores_ratios"] = info.stores_ratios;
    format["words_per_state"] = info.words_per_state;
    format["is_random"] = info.is_random;
    formats.append(format);
  }
  return formats;
}

// {"error": reason} where there is no GPU.
py::dict CudaInfo() {
  const Gpus found = FindGpus();
  py::dict info;
  if (found.driver != 0) info["driver"] = found.driver;
  if (!found.error.empty()) {
    info["error"] = found.error;
    return info;
  }
  py::list devices;
  for (const Gpu& gpu : found.gpus) {
    py::dict device;
    device["name"] = gpu.name;
    device["compute_capability"] = py::make_tuple(gpu.major, gpu.minor);
    device["total_bytes"] = gpu.total_bytes;
    device["concurrent_managed"] = gpu.concurrent_managed;
    device["pci_bus_id"] = gpu.pci_bus_id;
    devices.append(device);
  }
  info["devices"] = devices;
  return info;
}

// Bytes of a leaf's blocks, and of those that are resident.
std::pair<int64_t, int64_t> LeafBytes(const ArenaReport& report, const Signature::LeafInfo& leaf) {
  const int64_t blocks = NumBlocks(leaf.size);
  const int64_t nbytes = report.extent.regions[leaf.format].shape.NumBytes() * report.num_slots;
  const int64_t resident =
      std::clamp<int64_t>(report.resident_blocks[leaf.format] - leaf.first_block, 0, blocks);
  return {blocks * nbytes, resident * nbytes};
}

py::dict ReportToPython(const ArenaReport& report) {
  py::list leaves, leaf_bytes;
  for (const Signature::LeafInfo& leaf : report.leaves) {
    leaves.append(py::make_tuple(kFormats[leaf.format].name, py::tuple(py::cast(leaf.dims))));
    const auto [total, resident] = LeafBytes(report, leaf);
    leaf_bytes.append(py::make_tuple(total, resident));
  }
  py::dict item;
  item["platform"] = Name(report.device.platform);
  item["ordinal"] = report.device.ordinal;
  item["handle"] = report.handle;
  item["version"] = report.version;
  item["age"] = report.age;
  item["tree"] = report.tree;
  item["rule"] = static_cast<int>(report.rule);
  item["shards"] = report.shards;
  item["names"] = report.names.paths();
  item["num_devices"] = report.num_devices;
  item["memory"] = Name(report.kind);
  item["total"] = report.nbytes;
  item["replay"] = report.nbytes / report.num_slots * (report.num_slots - 1);
  item["resident"] = report.resident_bytes;
  item["budget"] = report.budget;
  item["limit"] = report.residency.limit;
  item["moved"] = report.residency.moved_bytes;
  item["moving_seconds"] = report.residency.moving_seconds;
  item["trouble"] = report.trouble;
  item["leaves"] = leaves;
  item["leaf_bytes"] = leaf_bytes;
  return item;
}

py::list Describe(int32_t handle, int32_t version) {
  std::vector<ArenaReport> reports;
  {
    const WithoutGil unlocked;
    reports = Registry::Get().Describe({handle, version});
  }
  py::list result;
  for (const ArenaReport& report : reports) result.append(ReportToPython(report));
  return result;
}

py::object FindNewest(int32_t handle) {
  std::optional<Registry::Newest> newest;
  {
    const WithoutGil unlocked;
    newest = Registry::Get().FindNewest(handle);
  }
  if (!newest) return py::none();
  const py::object count =
      newest->count == kNoCount ? py::object(py::none()) : py::object(py::int_(newest->count));
  return py::make_tuple(newest->version, count, newest->started, newest->first);
}

// The reports of all arenas, and (handle, seconds since it was issued) of those without one.
py::tuple ListStates() {
  std::vector<ArenaReport> reports;
  std::vector<std::pair<int32_t, double>> unused;
  {
    const WithoutGil unlocked;
    reports = Registry::Get().DescribeAll();
    unused = Registry::Get().handles().UnusedWithAges();
  }
  py::list arenas;
  for (const ArenaReport& report : reports) arenas.append(ReportToPython(report));
  return py::make_tuple(arenas, unused);
}

using Arrays = std::vector<py::array_t<uint8_t, py::array::c_style>>;

// `leaves`: (number of the leaf, codes of each state, words of each state), as bytes.
int32_t Rewrite(const std::string& platform, int ordinal, int32_t handle, int32_t version,
                const std::vector<std::tuple<size_t, Arrays, Arrays>>& leaves) {
  std::vector<LeafRewrite> rewrites;
  for (const auto& [leaf, codes, words] : leaves) {
    LeafRewrite rewrite{leaf, {}, {}};
    for (const auto& array : codes) rewrite.codes.push_back({array.data(), array.size()});
    for (const auto& array : words) rewrite.words.push_back({array.data(), array.size()});
    rewrites.push_back(std::move(rewrite));
  }
  const DeviceId device{platform == "cpu" ? Platform::kCpu : Platform::kCuda, ordinal};
  const WithoutGil unlocked;
  return Registry::Get().Rewrite(device, {handle, version}, rewrites);
}

// A state as Python describes it: the fields of a step, and the shape of each leaf on a device.
Prospect ProspectFromPython(const py::dict& state) {
  const int rule = state["rule"].cast<int>();
  if (rule < 0 || rule >= Rules::kSize) {
    throw StatusError(StatusCode::kInvalidArgument, "there is no rule " + std::to_string(rule));
  }
  Prospect prospect{Signature(static_cast<int8_t>(rule), /*paths=*/0,
                              state["replay"].cast<bool>() ? 2 : 1, /*num_devices=*/1, ""),
                    {state["device_bytes"].cast<int64_t>(), state["headroom_bytes"].cast<int64_t>(),
                     /*pinned=*/false, /*directory=*/""}};
  const auto formats = state["formats"].cast<std::vector<int>>();
  const auto shapes = state["shapes"].cast<std::vector<std::vector<int64_t>>>();
  if (formats.size() != shapes.size()) {
    throw StatusError(StatusCode::kInvalidArgument, "each leaf needs a format and a shape");
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    prospect.signature.Append(static_cast<int8_t>(formats[i]), shapes[i].data(),
                              static_cast<int64_t>(shapes[i].size()));
  }
  if (state["has_residuals"].cast<bool>()) prospect.signature.KeepResiduals();
  return prospect;
}

py::list ForecastToPython(const std::vector<py::dict>& states, int64_t free_bytes) {
  std::vector<Prospect> prospects;
  for (const py::dict& state : states) prospects.push_back(ProspectFromPython(state));
  py::list result;
  for (const Forecast& forecast : MakeForecast(prospects, free_bytes)) {
    py::dict item;
    item["on_cpu"] = forecast.on_cpu;
    item["on_gpu"] = forecast.on_gpu;
    item["resident"] = forecast.resident;
    item["host_traffic"] = forecast.host_traffic;
    result.append(item);
  }
  return result;
}

// Calls read(locked arena, slot) for the contents that a token stands for, without the GIL.
template <class F>
auto ReadContents(const std::string& platform, int ordinal, Token token, const F& read) {
  const WithoutGil unlocked;
  const DeviceId device{platform == "cpu" ? Platform::kCpu : Platform::kCuda, ordinal};
  const Registry::OpenSlot open = Registry::Get().Read(device, token);
  return read(open.locked, open.slot);
}

py::list ReadLeavesToPython(const std::string& platform, int ordinal, int32_t handle,
                            int32_t version) {
  py::list leaves;
  for (LeafParts& parts : ReadContents(platform, ordinal, {handle, version}, ReadLeaves)) {
    py::tuple leaf(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) leaf[i] = ToPython(std::move(parts[i]));
    leaves.append(leaf);
  }
  return leaves;
}

py::list ReadResidualsToPython(const std::string& platform, int ordinal, int32_t handle,
                               int32_t version) {
  py::list leaves;
  for (LeafPart& part : ReadContents(platform, ordinal, {handle, version}, ReadResiduals)) {
    leaves.append(ToPython(std::move(part)));
  }
  return leaves;
}

#if PAGED_OPTAX_TESTING
void AskForFailure(const std::string& call, int after, int error) {
  Faults::Get().Ask(call, after, error);
}
bool WithdrawFailure() { return Faults::Get().Withdraw(); }
bool IsFailureAsked() { return Faults::Get().IsAsked(); }
#else
void AskForFailure(const std::string&, int, int) {}
bool WithdrawFailure() { return false; }
bool IsFailureAsked() { return false; }
#endif

constexpr Internals kInternals{[] { return Registry::Get().NumArenas(); },
                               [] { Registry::Get().ThrowIfRefused(); },
                               PostNotice,
                               DeliverNotices,
                               PretendNotManaged,
                               PretendAvailable,
                               PromisedBytes,
                               AskForFailure,
                               WithdrawFailure,
                               IsFailureAsked,
                               [](long type) { return Classify(type).danger; }};

}  // namespace
}  // namespace paged_optax

PYBIND11_MODULE(_ext, module) {
  using namespace paged_optax;
  using Unlocked = py::call_guard<WithoutGil>;
  module.doc() = "Handlers and registry of paged_optax; use the Python package, not this module.";
  static PyObject* const state_refused = PyErr_NewExceptionWithDoc(
      "paged_optax.StateRefused", kStateRefusedDoc, PyExc_RuntimeError, nullptr);
  module.attr("StateRefused") = py::handle(state_refused);
  TranslateErrors(state_refused);
  module.def("targets", &Targets);
  module.def("build_info", &BuildInfo);
  module.def("update_attrs", &UpdateAttributes);
  module.def("rules", &DescribeAllRules);
  module.def("formats", &DescribeAllFormats);
  module.def("param_roundings", [] { return kParamRoundingNames; });
  module.def("outputs", [] { return kOutputNames; });
  module.def("cuda_info", &CudaInfo);
  module.def("free_device_bytes", &FreeDeviceBytes, py::arg("ordinal"));
  module.def("available_host_bytes", &AvailableHostBytes);
  module.def("describe", &Describe, py::arg("handle"), py::arg("version"));
  module.def("forecast", &ForecastToPython, py::arg("states"), py::arg("free_bytes"));
  module.def("read_leaves", &ReadLeavesToPython, py::arg("platform"), py::arg("ordinal"),
             py::arg("handle"), py::arg("version"));
  module.def("read_residuals", &ReadResidualsToPython, py::arg("platform"), py::arg("ordinal"),
             py::arg("handle"), py::arg("version"));
  module.def(
      "release", [](int32_t handle) { return Registry::Get().Release(handle); }, py::arg("handle"),
      Unlocked());
  module.def("release_all", [] { return Registry::Get().ReleaseAll(); }, Unlocked());
  module.def(
      "limit",
      [](int32_t handle, int32_t version, int64_t device_bytes) {
        return Registry::Get().Limit({handle, version}, device_bytes);
      },
      py::arg("handle"), py::arg("version"), py::arg("device_bytes"), Unlocked());
  DefineCheckpoints(module);
  module.def("newest", &FindNewest, py::arg("handle"));
  module.def("list_states", &ListStates);
  module.def("rewrite", &Rewrite, py::arg("platform"), py::arg("ordinal"), py::arg("handle"),
             py::arg("version"), py::arg("leaves"));
  module.def("num_unused", [] { return Registry::Get().handles().num_unused(); });
  module.def(
      "is_unused",
      [](int32_t handle) {
        return Registry::Get().handles().OriginOf(handle) == Handles::Origin::kUnused;
      },
      py::arg("handle"));
  module.def(
      "forget_now", [](int32_t handle) { Registry::Get().handles().ForgetNow(handle); },
      py::arg("handle"), Unlocked());
  module.def("any_refused", [] { return Registry::Get().AnyRefused(); });
  module.def(
      "raise_refused",
      [](std::optional<int32_t> handle) { Registry::Get().ThrowIfRefused(handle); },
      py::arg("handle") = py::none(), Unlocked());
  module.def(
      "forget_refused", [](int32_t handle) { Registry::Get().ForgetRefused(handle); },
      py::arg("handle"), Unlocked());
  module.def("stop_pagers", [] { Registry::Get().StopPagers(); }, Unlocked());
  module.def("set_notice_handler", &SetNoticeHandler);
  module.def("close_interpreter", &CloseInterpreter, Unlocked());
  module.def("forget_parent", [] {
    ForgetThreadsInInterpreter();
    ForgetNoticesOfParent();
  });
  module.def("set_shared_base",
             [](int32_t random) { Registry::Get().handles().SetSharedBase(random); });
#if PAGED_OPTAX_CUDA
  module.def(
      "measure_link",
      [](int ordinal, int64_t nbytes) {
        const LinkRates rates = MeasureLink(ordinal, nbytes);
        return std::make_tuple(rates.in, rates.out, rates.each_way);
      },
      py::arg("ordinal"), py::arg("nbytes"), Unlocked());
#endif
  module.attr("_internals") = py::capsule(&kInternals, Internals::kName);
}
