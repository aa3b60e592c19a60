// The tests' own Python module, paged_optax._testing, which only a test build has: codes, steps,
// random bits and the pager's decisions by themselves, without XLA; and a look inside _ext.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32.h"
#include "base/status.h"
#include "memory/planner.h"
#include "memory/preflight.h"
#include "python/errors.h"
#include "python/internals.h"
#include "rules/rules.h"
#include "step/step_cpu.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "base/device_buffer.h"
#include "python/testing.h"
#endif

namespace py = ::pybind11;

namespace paged_optax {
namespace {

// The code alone: codes of values that are already divided by their block's scale.
py::array_t<uint8_t> Encode(const py::array_t<float, py::array::c_style>& values, bool is_signed) {
  static constexpr DynamicMaps<int32_t> kMaps = MakeDynamicMaps<int32_t>();
  py::array_t<uint8_t> codes(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    const float value[1] = {values.data()[i]};
    uint8_t code[1];
    if (is_signed) {
      EncodeValues<true>(kMaps.of_signed, 1.0f, value, code);
    } else {
      EncodeValues<false>(kMaps.of_non_negative, 1.0f, value, code);
    }
    codes.mutable_data()[i] = code[0];
  }
  return codes;
}

// The `ratio` code alone. The word of a block:
uint32_t WindowWord(uint32_t top, uint32_t range, bool has_zeros) {
  return FitWindow<8>(top, range, has_zeros).word;
}

// codes of second moments in such a block;
py::array_t<uint8_t> EncodeNus(const py::array_t<float, py::array::c_style>& values, uint32_t top,
                               uint32_t range, bool has_zeros,
                               const py::array_t<uint32_t, py::array::c_style>& random) {
  py::array_t<uint8_t> codes(values.size());
  const RatioWindow window = FitWindow<8>(top, range, has_zeros);
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    float nu[1] = {values.data()[i]};
    const uint32_t words[1] = {random.data()[i]};
    uint8_t code[1];
    uint32_t not_zero[1];
    EncodeRatioNus(window, words, nu, code, not_zero);
    codes.mutable_data()[i] = code[0];
  }
  return codes;
}

// and of first moments that are already divided by their units.
py::array_t<uint8_t> EncodeMus(const py::array_t<float, py::array::c_style>& ratios, float scale,
                               const py::array_t<uint32_t, py::array::c_style>& random) {
  py::array_t<uint8_t> codes(ratios.size());
  for (py::ssize_t i = 0; i < ratios.size(); ++i) {
    codes.mutable_data()[i] = EncodeRatioMu<8>(
        IeeeMath(), ratios.data()[i], InverseMuStep<8>(IeeeMath(), scale, Limits<true>::kLeast),
        random.data()[i]);
  }
  return codes;
}

// Random bits alone: those of elements [start, start + size) of a leaf.
py::array_t<uint32_t> RandomBitsOf(int64_t leaf_key, int32_t count, int64_t start, int64_t size) {
  py::array_t<uint32_t> bits(size);
  for (int64_t i = 0; i < size; ++i) {
    const RandomKey key = BlockKey(StepKey(count), static_cast<uint64_t>(leaf_key), start + i);
    bits.mutable_data()[i] = RandomBits(key, static_cast<uint32_t>(start + i));
  }
  return bits;
}

// A region at the start of an arena, for tests that look at its bytes.
Region RegionOf(int rule, int format, int64_t num_blocks, bool has_residuals, int64_t start = 0) {
  const auto num_states = static_cast<int32_t>(AllRules().at(rule).states.size());
  const FormatInfo& info = kFormats.at(format);
  return MakeRegion({num_states, info.state_bytes, info.words_per_state * num_states,
                     has_residuals ? static_cast<int32_t>(kResidualBytes) : 0},
                    num_blocks, start);
}

// The step alone: blocks [begin, end) of a single leaf, states in `arena`.
void StepLeaf(int rule, py::buffer values, int dtype, int format, py::buffer arena, int64_t begin,
              int64_t end, const std::vector<float>& hyperparams, int32_t count, uint32_t flags,
              bool fresh, int64_t leaf_key) {
  const py::buffer_info values_info = values.request(/*writable=*/true);
  const py::buffer_info arena_info = arena.request(/*writable=*/true);
  Leaf leaf{};
  leaf.grads = leaf.results = values_info.ptr;
  leaf.dtype = leaf.result_dtype = static_cast<DType>(dtype);
  leaf.format = static_cast<int8_t>(format);
  leaf.key = static_cast<uint64_t>(leaf_key);
  leaf.size = values_info.size * values_info.itemsize / SizeOf(leaf.dtype);
  const int64_t blocks = NumBlocks(leaf.size);
  const Region region = RegionOf(rule, format, blocks, /*has_residuals=*/false);
  if (begin < 0 || end > blocks || region.end_byte > arena_info.size * arena_info.itemsize ||
      hyperparams.size() != AllRules().at(rule).hyperparams.size()) {
    throw StatusError(StatusCode::kInvalidArgument, "blocks outside the leaf, or arena too small");
  }
  uint8_t* base = static_cast<uint8_t*>(arena_info.ptr);
  const CpuWork work{&leaf, 1, region, fresh ? nullptr : base, base, Output::kDirection};
  const StepKind kind{static_cast<int8_t>(rule), Output::kDirection, flags, BadElement::kNan};
  FindCpuStep(kind, leaf.format)(PrepareStep(kind, hyperparams.data(), count), work, begin, end);
}

// Of the extension that runs the tests' programs.
const Internals& Ext() {
  const py::object capsule = py::module_::import("paged_optax._ext").attr("_internals");
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), Internals::kName);
  if (pointer == nullptr) throw py::error_already_set();
  return *static_cast<const Internals*>(pointer);
}

void AddInternals(py::module_& module) {
  module.def("num_arenas", [] { return Ext().num_arenas(); });
  module.def("raise_if_refused", [] {
    const auto throw_if_refused = Ext().throw_if_refused;
    const py::gil_scoped_release unlocked;
    throw_if_refused();
  });
  module.def("post_notice", [](int ordinal, int64_t missing_bytes, const std::string& text) {
    Ext().post_notice({ordinal, missing_bytes, text});
  });
  module.def("deliver_notices", [] { Ext().deliver_notices(); });
  module.def(
      "fail_call",
      [](const std::string& call, int error, int after) {
        Ext().ask_for_failure(call, after, error);
      },
      py::arg("call"), py::arg("error"), py::arg("after") = 0);
  module.def("withdraw_failure", [] { return Ext().withdraw_failure(); });
  module.def("is_asked", [] { return Ext().is_failure_asked(); });
  module.def("promised", [] { return Ext().promised_bytes(); });
  module.def("danger_of", [](long type) { return Ext().danger_of(type); }, py::arg("type"));
  module.def(
      "pretend_not_managed", [](bool pretend) { Ext().pretend_not_managed(pretend); },
      py::arg("pretend"));
  module.def(
      "pretend_available", [](int64_t nbytes) { Ext().pretend_available(nbytes); },
      py::arg("nbytes"));
}

void AddMemory(py::module_& module) {
  module.def("check_host_memory",
             [](int64_t nbytes) { CheckHostMemory(nbytes, AvailableHostBytes(), /*promised=*/0); });
  module.def("check_address_space", &CheckAddressSpace);
#if PAGED_OPTAX_CUDA
  module.def("count_inexact", &CountInexact, py::arg("ordinal"));
  module.def("take_device_memory", [](int ordinal, int64_t nbytes) {
    const ScopedDevice scope(ordinal);
    return py::capsule(new DeviceBuffer(nbytes),
                       [](void* buffer) { delete static_cast<DeviceBuffer*>(buffer); });
  });
#endif
}

void AddPlanner(py::module_& module) {
  module.def("fair_shares",
             [](const std::vector<std::pair<int64_t, int64_t>>& demands, int64_t capacity) {
               std::vector<Demand> converted;
               for (const auto& [wanted, budget] : demands) converted.push_back({wanted, budget});
               return FairShares(converted, capacity);
             });
  module.def("steady_capacity", [](const std::vector<int64_t>& capacities) {
    SteadyCapacity steady;
    std::vector<int64_t> seen;
    for (const int64_t capacity : capacities) seen.push_back(steady.Observe(capacity));
    return seen;
  });
  py::class_<Residency>(module, "Residency")
      .def(py::init([](int64_t nbytes, int32_t num_slots, int64_t device_bytes,
                       int64_t headroom_bytes, bool is_kept) {
             Residency state;
             state.geometry = MakeGeometry(nbytes / num_slots, num_slots);
             state.device_bytes = device_bytes;
             state.headroom_bytes = headroom_bytes;
             state.is_kept = is_kept;
             return state;
           }),
           py::arg("nbytes"), py::arg("num_slots") = 1, py::arg("device_bytes") = -1,
           py::arg("headroom_bytes") = 0, py::arg("is_kept") = true)
      .def_readwrite("segments", &Residency::segments)
      .def_readwrite("target", &Residency::target)
      .def_readwrite("moving", &Residency::moving)
      .def_readwrite("held", &Residency::held)
      .def_readwrite("limit", &Residency::limit)
      .def_readwrite("failure", &Residency::failure)
      .def("leading_bytes",
           [](const Residency& state, int32_t n) { return state.geometry.LeadingBytes(n); });
  py::class_<Planner>(module, "Planner")
      .def(py::init<>())
      .def("place",
           [](Planner& planner, const Residencies& states, const Residency& newcomer,
              int64_t free_bytes) {
             const FirstShare share = planner.Place(states, newcomer, free_bytes);
             return std::make_pair(share.segments, share.missing_bytes);
           })
      .def("observe", &Planner::Observe)
      .def("note_slow_step", &Planner::NoteSlowStep)
      .def("retarget", &Planner::Retarget, py::arg("states"), py::arg("free_bytes"),
           py::arg("only") = nullptr)
      .def("next",
           [](Planner& planner, const Residencies& states, int64_t free_bytes, int64_t most_bytes) {
             Step step;
             const bool any = planner.Next(states, free_bytes, most_bytes, &step);
             return any ? py::object(py::make_tuple(step.state, step.segments)) : py::none();
           })
      .def("begin",
           [](Planner& planner, const Residencies& states, size_t state, int32_t segments,
              int64_t free_bytes) { planner.Begin(states, {state, segments}, free_bytes); });
}

void AddArithmetic(py::module_& module) {
  module.def("encode", &Encode, py::arg("values"), py::arg("signed"));
  module.def("window_word", &WindowWord, py::arg("top"), py::arg("range"), py::arg("has_zeros"));
  module.def("encode_ratio_nu", &EncodeNus, py::arg("values"), py::arg("top"), py::arg("range"),
             py::arg("has_zeros"), py::arg("random"));
  module.def("encode_ratio_mu", &EncodeMus, py::arg("ratios"), py::arg("scale"), py::arg("random"));
  module.def("random_bits", &RandomBitsOf, py::arg("leaf_key"), py::arg("count"), py::arg("start"),
             py::arg("size"));
  module.def("step_leaf", &StepLeaf, py::arg("rule"), py::arg("values"), py::arg("dtype"),
             py::arg("format"), py::arg("arena"), py::arg("begin"), py::arg("end"),
             py::arg("hyperparams"), py::arg("count"), py::arg("flags") = 0,
             py::arg("fresh") = false, py::arg("leaf_key") = 0);
  const auto as_bytes = [](const std::string& data) {
    return reinterpret_cast<const uint8_t*>(data.data());
  };
  module.def("crc32", [=](const py::bytes& data, uint32_t start) {
    const auto bytes = static_cast<std::string>(data);
    return Crc32(start, as_bytes(bytes), static_cast<int64_t>(bytes.size()));
  });
  module.def("plain_crc32", [=](const py::bytes& data, uint32_t start) {
    const auto bytes = static_cast<std::string>(data);
    return PlainCrc32(start, as_bytes(bytes), static_cast<int64_t>(bytes.size()));
  });
  module.def("join_crc32", &JoinCrc32);
  // Where the blocks of a region lie that starts after `start` bytes: (first byte, end, blocks of
  // the first chunk, blocks of a chunk).
  module.def(
      "region",
      [](int rule, int format, int64_t num_blocks, bool has_residuals, int64_t start) {
        const Region region = RegionOf(rule, format, num_blocks, has_residuals, start);
        return std::make_tuple(region.first_byte, region.end_byte,
                               region.blocks_per_chunk - region.lead, region.blocks_per_chunk);
      },
      py::arg("rule"), py::arg("format"), py::arg("num_blocks"), py::arg("has_residuals") = false,
      py::arg("start") = 0);
}

}  // namespace
}  // namespace paged_optax

PYBIND11_MODULE(_testing, module) {
  module.doc() = "What the tests of paged_optax see of its C++ side.";
  paged_optax::TranslateErrors(
      py::module_::import("paged_optax._ext").attr("StateRefused"));  // which _ext keeps
  paged_optax::AddInternals(module);
  paged_optax::AddMemory(module);
  paged_optax::AddPlanner(module);
  paged_optax::AddArithmetic(module);
}
