// See checkpoint.h.
#include "python/checkpoint.h"

#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status.h"
#include "python/interpreter.h"
#include "rules/rules.h"
#include "state/background_save.h"
#include "state/registry.h"
#include "state/save.h"
#include "state/source.h"

namespace py = ::pybind11;

namespace paged_optax {
namespace {

// ---------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------

// A Snapshot that Python closes, maybe while another thread still reads.
class PySnapshot {
 public:
  explicit PySnapshot(Snapshot snapshot)
      : snapshot_(std::make_shared<const Snapshot>(std::move(snapshot))) {}
  PySnapshot(PySnapshot&&) = default;
  ~PySnapshot() {
    if (snapshot_ != nullptr) Close();
  }

  std::shared_ptr<const Snapshot> get() const {
    if (snapshot_ == nullptr) {
      throw StatusError(StatusCode::kFailedPrecondition, "this snapshot of moments is closed");
    }
    return snapshot_;
  }
  // The last one may free an arena, which waits for its device. Nobody should with the GIL.
  void Close() {
    std::shared_ptr<const Snapshot> last;
    std::swap(last, snapshot_);
    const WithoutGil unlocked;
    last.reset();
  }

 private:
  std::shared_ptr<const Snapshot> snapshot_;
};

using Wanted = std::tuple<std::string, int, int32_t, int32_t>;  // platform, ordinal and token

std::vector<PySnapshot> OpenSnapshots(const std::vector<Wanted>& wanted) {
  std::vector<Registry::Wanted> all;
  for (const auto& [platform, ordinal, handle, version] : wanted) {
    all.push_back(
        {{platform == "cpu" ? Platform::kCpu : Platform::kCuda, ordinal}, {handle, version}});
  }
  std::vector<Snapshot> found;
  {
    const WithoutGil unlocked;
    found = Registry::Get().HoldAll(all);
  }
  std::vector<PySnapshot> snapshots;
  for (Snapshot& each : found) snapshots.emplace_back(std::move(each));
  return snapshots;
}

PySnapshot OpenSnapshot(const std::string& platform, int ordinal, int32_t handle, int32_t version) {
  return std::move(OpenSnapshots({{platform, ordinal, handle, version}}).front());
}

const Signature::LeafInfo& LeafOf(const Snapshot& snapshot, size_t leaf) {
  if (leaf >= snapshot.leaves().size()) throw py::index_error("there is no such leaf");
  return snapshot.leaves()[leaf];
}

Snapshot::Kind KindOf(const std::string& kind) {
  if (kind == "codes") return Snapshot::Kind::kCodes;
  if (kind == "words") return Snapshot::Kind::kWords;
  if (kind == "residuals") return Snapshot::Kind::kResiduals;
  throw py::value_error("kind must be 'codes', 'words' or 'residuals', and is '" + kind + "'");
}

py::array ReadPart(const PySnapshot& self, size_t leaf, const std::string& kind, int32_t state,
                   int64_t begin, int64_t end) {
  const auto snapshot = self.get();
  LeafOf(*snapshot, leaf);
  const Snapshot::Kind number = KindOf(kind);
  std::optional<LeafPart> part;
  {
    const WithoutGil unlocked;
    part = snapshot->Read(leaf, number, state, begin, end);
  }
  return ToPython(std::move(*part));
}

// (codes of every state, words of every state, residuals or None)
py::tuple ReadLeafParts(const PySnapshot& self, size_t leaf) {
  const auto snapshot = self.get();
  const FormatInfo& format = kFormats[LeafOf(*snapshot, leaf).format];
  const size_t num_states = AllRules()[snapshot->arena().signature.rule()].states.size();
  const auto read = [&](const char* kind, size_t count) {
    py::tuple parts(count);
    for (size_t s = 0; s < count; ++s) {
      parts[s] = ReadPart(self, leaf, kind, static_cast<int32_t>(s), 0, -1);
    }
    return parts;
  };
  const py::tuple codes = read("codes", num_states);
  const py::tuple words = read("words", num_states * format.words_per_state);
  py::object residuals = py::none();
  if (snapshot->arena().signature.has_residuals()) {
    residuals = ReadPart(self, leaf, "residuals", 0, 0, -1);
  }
  return py::make_tuple(codes, words, residuals);
}

py::object BoxesOf(const Snapshot& snapshot) {
  if (!snapshot.boxes()) return py::none();
  py::list boxes;
  for (const LeafBox& leaf : *snapshot.boxes()) {
    boxes.append(
        py::make_tuple(py::tuple(py::cast(leaf.whole)), py::tuple(py::cast(leaf.box.start))));
  }
  return boxes;
}

py::list FormatsOf(const Snapshot& snapshot) {
  py::list formats;
  for (const auto& leaf : snapshot.leaves()) formats.append(kFormats[leaf.format].name);
  return formats;
}

py::list ShapesOf(const Snapshot& snapshot) {
  py::list shapes;
  for (const auto& leaf : snapshot.leaves()) shapes.append(py::tuple(py::cast(leaf.dims)));
  return shapes;
}

void DefineSnapshot(py::module_& module) {
  const auto property = [](auto value) {
    return [value](const PySnapshot& self) { return value(*self.get()); };
  };
  py::class_<PySnapshot>(module, "Snapshot")
      .def_property_readonly("handle",
                             property([](const Snapshot& s) { return s.arena().header.handle; }))
      .def_property_readonly("version", property([](const Snapshot& s) { return s.version(); }))
      .def_property_readonly("rule", property([](const Snapshot& s) {
                               return AllRules()[s.arena().signature.rule()].name;
                             }))
      .def_property_readonly(
          "num_slots", property([](const Snapshot& s) { return s.arena().signature.num_slots(); }))
      .def_property_readonly("num_devices", property([](const Snapshot& s) {
                               return s.arena().signature.num_devices();
                             }))
      .def_property_readonly("has_residuals", property([](const Snapshot& s) {
                               return s.arena().signature.has_residuals();
                             }))
      .def_property_readonly("shards", property([](const Snapshot& s) { return s.arena().shards; }))
      .def_property_readonly("part", property([](const Snapshot& s) { return s.arena().part; }))
      .def_property_readonly("tree", property([](const Snapshot& s) { return s.arena().tree; }))
      .def_property_readonly("names",
                             property([](const Snapshot& s) { return s.arena().names.paths(); }))
      .def_property_readonly("num_leaves",
                             property([](const Snapshot& s) { return s.leaves().size(); }))
      .def_property_readonly("formats", property(FormatsOf))
      .def_property_readonly("shapes", property(ShapesOf))
      .def_property_readonly("boxes", property(BoxesOf))
      .def("read", &ReadLeafParts, py::arg("leaf"))
      .def("read_part", &ReadPart, py::arg("leaf"), py::arg("kind"), py::arg("state") = 0,
           py::arg("begin") = 0, py::arg("end") = -1)
      .def("close", &PySnapshot::Close)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PySnapshot& self, const py::args&) { self.Close(); });
  module.def("snapshot", &OpenSnapshot, py::arg("platform"), py::arg("ordinal"), py::arg("handle"),
             py::arg("version"));
  module.def("snapshots", &OpenSnapshots, py::arg("wanted"));
}

// ---------------------------------------------------------------------------------------------------
// Staging
// ---------------------------------------------------------------------------------------------------

// A buffer of Python, kept alive until no thread of the library needs it.
std::shared_ptr<const void> KeepAlive(Py_buffer* view) {
  return std::shared_ptr<const void>(view, [view](const void*) {
    const InterpreterStays stays;
    if (!stays) return;  // the process ends
    const py::gil_scoped_acquire locked;
    PyBuffer_Release(view);
    delete view;
  });
}

// The bytes of a file's name, which need not be UTF-8; as os.fsencode.
std::string PathOf(const py::handle& path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
  return std::string(py::reinterpret_steal<py::bytes>(bytes));
}

// The same name for messages, which are UTF-8.
std::string ShownPathOf(const py::handle& path) {
  const py::object text = py::str(path);
  PyObject* const shown = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace");
  if (shown == nullptr) throw py::error_already_set();
  return std::string(py::reinterpret_steal<py::bytes>(shown));
}

Data DataOf(const py::handle& item) {
  Data data;
  if (py::isinstance<py::tuple>(item)) {
    const auto [path, offset, nbytes, crc] =
        item.cast<std::tuple<py::object, int64_t, int64_t, std::optional<uint32_t>>>();
    if (offset < 0 || nbytes < 0) throw py::value_error("a negative offset or size");
    data.path = PathOf(path);
    data.shown_path = ShownPathOf(path);
    data.offset = offset;
    data.nbytes = nbytes;
    data.crc = crc;
    return data;
  }
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(item.ptr(), view.get(), PyBUF_C_CONTIGUOUS) != 0) {
    throw py::error_already_set();
  }
  static const uint8_t nothing = 0;
  data.nbytes = view->len;
  data.bytes = view->len == 0 ? &nothing : static_cast<const uint8_t*>(view->buf);
  data.owner = KeepAlive(view.release());
  return data;
}

std::vector<Data> ArraysOf(const py::handle& items) {
  std::vector<Data> arrays;
  for (const py::handle& item : items) arrays.push_back(DataOf(item));
  return arrays;
}

template <class T>
T Get(const py::dict& dict, const char* key) {
  if (!dict.contains(key)) throw py::value_error(std::string("the moments have no '") + key + "'");
  return dict[key].cast<T>();
}

template <class T>
T Get(const py::dict& dict, const char* key, T otherwise) {
  return dict.contains(key) ? dict[key].cast<T>() : otherwise;
}

Piece PieceOf(const py::dict& dict) {
  Piece piece{{Get<std::vector<int64_t>>(dict, "start"), Get<std::vector<int64_t>>(dict, "shape")},
              ArraysOf(Get<py::sequence>(dict, "codes")),
              ArraysOf(Get<py::sequence>(dict, "words"))};
  const auto residuals = Get<py::object>(dict, "residuals", py::none());
  if (!residuals.is_none()) piece.residuals = DataOf(residuals);
  return piece;
}

// The place of a name; -1 if it is not there.
template <class List>
int8_t FindName(const List& list, const std::string& name) {
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].name == name) return static_cast<int8_t>(i);
  }
  return -1;
}

Source SourceOf(const py::dict& spec) {
  Source source{FindName(AllRules(), Get<std::string>(spec, "rule")),
                Get<bool>(spec, "has_residuals"),
                Get<bool>(spec, "convert", false),
                Get<int64_t>(spec, "local_devices", 0),
                {}};
  for (const py::handle& item : Get<py::sequence>(spec, "leaves")) {
    const auto dict = item.cast<py::dict>();
    SourceLeaf leaf{Get<std::string>(dict, "name"),
                    Get<std::vector<int64_t>>(dict, "shape"),
                    FindName(kFormats, Get<std::string>(dict, "format")),
                    {}};
    for (const py::handle& piece : Get<py::sequence>(dict, "pieces")) {
      leaf.pieces.push_back(PieceOf(piece.cast<py::dict>()));
    }
    source.leaves.push_back(std::move(leaf));
  }
  return source;
}

std::pair<int32_t, int32_t> Stage(const py::dict& spec) {
  std::shared_ptr<const Source> source;
  try {
    source = std::make_shared<const Source>(SourceOf(spec));
  } catch (const py::cast_error&) {
    throw py::value_error("the moments' description has a value of a wrong type or size");
  }
  const bool shared = Get<bool>(spec, "shared", false);
  const WithoutGil unlocked;
  CheckSource(*source);
  return {Registry::Get().handles().Stage(std::move(source), shared), 1};
}

py::object DescribeStaged(int32_t handle) {
  const auto source = Registry::Get().handles().SourceOf(handle);
  if (source == nullptr) return py::none();
  py::list leaves;
  for (const SourceLeaf& leaf : source->leaves) {
    leaves.append(
        py::make_tuple(leaf.name, kFormats[leaf.format].name, py::tuple(py::cast(leaf.shape))));
  }
  py::dict description;
  description["rule"] = AllRules()[source->rule].name;
  description["has_residuals"] = source->has_residuals;
  description["convert"] = source->convert;
  description["leaves"] = leaves;
  description["filled"] = Registry::Get().handles().NumFilled(handle);
  return description;
}

void DefineStaging(py::module_& module) {
  using Unlocked = py::call_guard<WithoutGil>;
  module.def("stage", &Stage, py::arg("spec"));
  module.def("staged", &DescribeStaged, py::arg("handle"));
  module.def(
      "is_issued",
      [](int32_t handle) {
        return Registry::Get().handles().OriginOf(handle) != Handles::Origin::kElsewhere;
      },
      py::arg("handle"), Unlocked());
  module.def(
      "is_alive", [](int32_t handle) { return Registry::Get().IsAlive(handle); }, py::arg("handle"),
      Unlocked());
  module.def(
      "version_of", [](int32_t handle) { return Registry::Get().NewestVersion(handle); },
      py::arg("handle"), Unlocked());
  module.def(
      "forget",
      [](int32_t handle, bool now) {
        Handles& handles = Registry::Get().handles();
        const bool is_unused = handles.Forget(handle);
        if (is_unused && now) handles.Release(handle);
        return is_unused;
      },
      py::arg("handle"), py::arg("now") = false, Unlocked());
}

// ---------------------------------------------------------------------------------------------------
// Saving
// ---------------------------------------------------------------------------------------------------

// (snapshot, leaf, kind, state): what a device has.
SavedArray PartToSave(const py::tuple& part) {
  const auto snapshot = part[0].cast<const PySnapshot&>().get();
  const auto leaf = part[1].cast<size_t>();
  const Snapshot::Kind kind = KindOf(part[2].cast<std::string>());
  const auto state = part[3].cast<int32_t>();
  LeafOf(*snapshot, leaf);
  return {snapshot->NumBytes(leaf, kind, state),
          [=](int64_t begin, int64_t nbytes, uint8_t* destination) {
            snapshot->ReadBytes(leaf, kind, state, begin, begin + nbytes, destination);
          }};
}

// As DataOf takes it: a buffer, or a place in another file.
SavedArray DataToSave(const py::handle& item) {
  const auto data = std::make_shared<const Data>(DataOf(item));
  const auto read = [data](int64_t begin, int64_t nbytes, uint8_t* destination) {
    DiskBuffer scratch;
    DataReader(*data, /*is_read_once=*/true).Read(begin, nbytes, destination, scratch);
  };
  const auto check = [data](uint32_t crc) { CheckSum(*data, crc); };
  return {data->nbytes, read, check};
}

std::vector<SavedArray> ArraysToSave(const py::sequence& items) {
  std::vector<SavedArray> arrays;
  for (const py::handle& item : items) {
    const bool is_part =
        py::isinstance<py::tuple>(item) && py::isinstance<PySnapshot>(item.cast<py::tuple>()[0]);
    arrays.push_back(is_part ? PartToSave(item.cast<py::tuple>()) : DataToSave(item));
  }
  return arrays;
}

// Calls body() without the GIL, and raises OSError of a file for what the system said.
template <class F>
auto WithFile(const py::object& name, const F& body) {
  try {
    const WithoutGil unlocked;
    return body();
  } catch (const std::system_error& error) {
    const int number = error.code().value();
    const py::tuple arguments = py::make_tuple(number, std::strerror(number), name);
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
    throw py::error_already_set();
  }
}

std::vector<uint32_t> WriteArrays(const py::object& name, const py::sequence& items) {
  const std::string path = PathOf(name);
  std::vector<SavedArray> arrays = ArraysToSave(items);
  return WithFile(name, [&] {
    const std::vector<SavedArray> owned = std::move(arrays);  // it ends without the GIL too
    return SaveArrays(path, owned);
  });
}

// A BackgroundSave that ends without the GIL: its threads may wait for it.
class PyBackgroundSave {
 public:
  PyBackgroundSave(const py::object& name, const py::sequence& items, int64_t max_bytes)
      : name_(name) {
    const std::string path = PathOf(name);
    std::vector<SavedArray> arrays = ArraysToSave(items);
    save_ = WithFile(
        name, [&] { return std::make_unique<BackgroundSave>(path, std::move(arrays), max_bytes); });
  }
  ~PyBackgroundSave() {
    if (save_ == nullptr) return;
    if (!save_->is_here()) {
      (void)save_.release();
      return;
    }
    const WithoutGil unlocked;
    save_.reset();
  }

  std::vector<uint32_t> Finish() {
    if (save_ == nullptr || !save_->is_here()) {
      throw py::value_error("this file is finished, or another process writes it");
    }
    const std::unique_ptr<BackgroundSave> save = std::move(save_);
    return WithFile(name_, [&] { return save->Finish(); });
  }

 private:
  py::object name_;
  std::unique_ptr<BackgroundSave> save_;
};

}  // namespace

void DefineCheckpoints(py::module_& module) {
  DefineSnapshot(module);
  DefineStaging(module);
  module.def("write_arrays", &WriteArrays, py::arg("path"), py::arg("arrays"));
  py::class_<PyBackgroundSave>(module, "BackgroundSave")
      .def(py::init<const py::object&, const py::sequence&, int64_t>(), py::arg("path"),
           py::arg("arrays"), py::arg("max_bytes"))
      .def("finish", &PyBackgroundSave::Finish);
}

}  // namespace paged_optax
