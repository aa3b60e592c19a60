// An update as XLA hands it over: the attributes of the program, and operands and results of the
// call. Parse checks them and turns them into what a step takes.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include "layout/token.h"
#include "state/arena.h"
#include "step/block.h"
#include "xla/ffi/api/ffi.h"

namespace paged_optax {

// What the compiled program says of an update: (type, name), sorted by name. paged_optax/_step.py
// mirrors them and says what they mean; a test compares the two.
//
// One value a leaf: decays, formats, keys (empty if nothing is rounded at random; decays are empty
// unless the step takes the parameters). device_bytes is -1 for no budget, shards and directory are
// empty for none. paths and tree are numbers for the names of the leaves and for the tree.
#define PAGED_UPDATE_ATTRS(X)                \
  X(bool, clips)                             \
  X(::xla::ffi::Span<const int8_t>, decays)  \
  X(int64_t, device_bytes)                   \
  X(std::string_view, directory)             \
  X(int64_t, flags)                          \
  X(::xla::ffi::Span<const int8_t>, formats) \
  X(int64_t, headroom_bytes)                 \
  X(::xla::ffi::Span<const int64_t>, keys)   \
  X(std::string_view, names)                 \
  X(int64_t, num_devices)                    \
  X(int64_t, output)                         \
  X(int64_t, param_rounding)                 \
  X(int64_t, paths)                          \
  X(bool, pinned)                            \
  X(bool, replay)                            \
  X(bool, restart)                           \
  X(int64_t, rule)                           \
  X(std::string_view, shards)                \
  X(bool, skip_elements)                     \
  X(int64_t, tree)

struct UpdateAttrs {
#define PAGED_DECLARE(type, name) type name;
  PAGED_UPDATE_ATTRS(PAGED_DECLARE)
#undef PAGED_DECLARE
};

// Throws: the program is not one that this version of the package compiled.
[[noreturn]] void RefuseCall(const std::string& problem);

// Where the data of an operand or result are. Throws unless it has so many elements of this type.
void* DataOf(::xla::ffi::AnyBuffer buffer, ::xla::ffi::DataType dtype, size_t count,
             const std::string& what);

// Throws for other types than those of gradients and parameters.
DType DTypeOf(::xla::ffi::DataType dtype);

// The names and types of the attributes.
std::vector<std::pair<const char*, const char*>> DescribeAttrs();

// The leaves of a call whose states have one format.
struct LeafRange {
  int64_t first, count;
};

// Operands: token s32[2], count s32[], hyperparams f32[n] (those of the rule, then those of
// MakeParamStep if the step takes the parameters, then those of ClipScale if it clips), part s32[]
// (which parts of the leaves the device has), then one gradient a leaf and, if the step takes them,
// one parameter a leaf. kSkipStep as count is a step that is skipped. Results: token s32[2], then a
// direction, an update or a new parameter a leaf, as the output says. Where it is kOpen, the
// leaves are arrays of the shapes of the stored ones, which are not read, and there are no results
// but the token.
struct UpdateCall {
  Signature signature;
  uint64_t fingerprint = 0;
  StepKind kind = {};
  const Token* token = nullptr;
  const int32_t* count = nullptr;
  const float* hyperparams = nullptr;
  const int32_t* part = nullptr;
  Token* new_token = nullptr;
  Extent extent = {};
  std::vector<Leaf> leaves = {};  // by region, then in the order of their blocks
  std::array<LeafRange, kFormats.size()> ranges = {};
};

// Throws if something is malformed.
UpdateCall Parse(const UpdateAttrs& attrs, const ::xla::ffi::RemainingArgs& args,
                 const ::xla::ffi::RemainingRets& rets);

}  // namespace paged_optax

#define PAGED_MEMBER(type, name) , ::xla::ffi::StructMember<type>(#name)
#define PAGED_APPLY(macro, ...) macro(__VA_ARGS__)
PAGED_APPLY(XLA_FFI_REGISTER_STRUCT_ATTR_DECODING,
            ::paged_optax::UpdateAttrs PAGED_UPDATE_ATTRS(PAGED_MEMBER));
#undef PAGED_APPLY
#undef PAGED_MEMBER
