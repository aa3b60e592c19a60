#include "xla/call.h"

#include <algorithm>
#include <string>

#include "base/status.h"
#include "rules/rules.h"
#include "state/registry.h"

namespace ffi = ::xla::ffi;

namespace paged_optax {

void RefuseCall(const std::string& problem) {
  throw StatusError(StatusCode::kInvalidArgument, "malformed call: " + problem);
}

void* DataOf(ffi::AnyBuffer buffer, ffi::DataType dtype, size_t count, const std::string& what) {
  if (buffer.element_type() != dtype || buffer.element_count() != count) {
    RefuseCall(what + " has another size or type");
  }
  return buffer.untyped_data();
}

namespace {

constexpr size_t kNumScalars = 4;  // operands before the gradients

template <class T>
constexpr const char* NameOf();
template <>
constexpr const char* NameOf<bool>() {
  return "bool";
}
template <>
constexpr const char* NameOf<int64_t>() {
  return "i64";
}
template <>
constexpr const char* NameOf<std::string_view>() {
  return "str";
}
template <>
constexpr const char* NameOf<ffi::Span<const int8_t>>() {
  return "i8[]";
}
template <>
constexpr const char* NameOf<ffi::Span<const int64_t>>() {
  return "i64[]";
}

int64_t InRange(const char* name, int64_t value, int64_t end) {
  if (value < 0 || value >= end) RefuseCall(std::string(name) + " is " + std::to_string(value));
  return value;
}

StepKind KindOf(const UpdateAttrs& attrs) {
  const int64_t rule = InRange("rule", attrs.rule, Rules::kSize);
  const int64_t num_flags = static_cast<int64_t>(AllRules()[rule].flags.size());
  return {static_cast<int8_t>(rule),
          static_cast<Output>(InRange("output", attrs.output, kOutputNames.size())),
          static_cast<uint32_t>(InRange("flags", attrs.flags, int64_t{1} << num_flags)),
          attrs.skip_elements ? BadElement::kSkip : BadElement::kNan, attrs.clips};
}

void CheckCounts(const UpdateAttrs& attrs, bool takes_params, size_t num_args, size_t num_rets) {
  const size_t num_leaves = attrs.formats.size(), num_params = takes_params ? num_leaves : 0;
  const bool may_lack_keys =
      !takes_params && std::none_of(attrs.formats.begin(), attrs.formats.end(),
                                    [](int8_t format) { return kFormats.at(format).is_random; });
  if (num_args != kNumScalars + num_leaves + num_params) {
    RefuseCall(std::to_string(num_args) + " operands for " + std::to_string(num_leaves) +
               " leaves");
  }
  if (num_rets != 1 + (attrs.output == static_cast<int64_t>(Output::kOpen) ? 0 : num_leaves)) {
    RefuseCall("a wrong number of results");
  }
  if (attrs.decays.size() != num_params) RefuseCall("a wrong number of decays");
  if (attrs.keys.size() != num_leaves && !(may_lack_keys && attrs.keys.size() == 0)) {
    RefuseCall("a wrong number of keys");
  }
}

template <class T>
T Scalars(const ffi::RemainingArgs& args, size_t index, ffi::DataType dtype, size_t count) {
  return static_cast<T>(
      DataOf(*args.get<ffi::AnyBuffer>(index), dtype, count, "operand " + std::to_string(index)));
}

Leaf ParseLeaf(const UpdateAttrs& attrs, const ffi::RemainingArgs& args,
               const ffi::RemainingRets& rets, size_t i, Output output, Signature& signature) {
  const ffi::AnyBuffer grad = *args.get<ffi::AnyBuffer>(kNumScalars + i);
  const auto dims = grad.dimensions();
  Leaf leaf{};
  leaf.size = static_cast<int64_t>(grad.element_count());
  leaf.format = attrs.formats[i];
  leaf.first_block = signature.Append(leaf.format, dims.begin(), static_cast<int64_t>(dims.size()));
  if (output == Output::kOpen) return leaf;
  ffi::AnyBuffer result = **rets.get<ffi::AnyBuffer>(1 + i);
  leaf.grads = grad.untyped_data();
  leaf.results = result.untyped_data();
  leaf.dtype = DTypeOf(grad.element_type());
  leaf.result_dtype = DTypeOf(result.element_type());
  if (attrs.keys.size() != 0) leaf.key = static_cast<uint64_t>(attrs.keys[i]);
  if (result.element_count() != grad.element_count()) {
    RefuseCall("a result has another size than its gradient");
  }
  if (output != Output::kParams && leaf.result_dtype != leaf.dtype) {
    RefuseCall("an update has another type than its gradient");
  }
  if (!TakesParams(output)) return leaf;
  const ffi::AnyBuffer param = *args.get<ffi::AnyBuffer>(kNumScalars + attrs.formats.size() + i);
  if (param.element_count() != grad.element_count()) {
    RefuseCall("a parameter has another size than its gradient");
  }
  leaf.params = param.untyped_data();
  leaf.param_dtype = DTypeOf(param.element_type());
  if (output == Output::kParams && leaf.result_dtype != leaf.param_dtype) {
    RefuseCall("a new parameter has another type than the old one");
  }
  leaf.rounding = leaf.param_dtype == DType::kFloat32
                      ? ParamRounding::kNearest
                      : static_cast<ParamRounding>(attrs.param_rounding);
  leaf.decays = attrs.decays[i] != 0;
  if (leaf.rounding == ParamRounding::kCompensated) signature.KeepResiduals();
  return leaf;
}

}  // namespace

DType DTypeOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    default:
      throw StatusError(StatusCode::kInvalidArgument,
                        "gradients and parameters must be float32, bfloat16 or float16");
  }
}

std::vector<std::pair<const char*, const char*>> DescribeAttrs() {
#define PAGED_DESCRIBE(type, name) {#name, NameOf<type>()},
  return {PAGED_UPDATE_ATTRS(PAGED_DESCRIBE)};
#undef PAGED_DESCRIBE
}

UpdateCall Parse(const UpdateAttrs& attrs, const ffi::RemainingArgs& args,
                 const ffi::RemainingRets& rets) {
  for (const int8_t format : attrs.formats) {
    InRange("a format", format, static_cast<int64_t>(kFormats.size()));
  }
  InRange("param_rounding", attrs.param_rounding, static_cast<int64_t>(kParamRoundingNames.size()));
  const StepKind kind = KindOf(attrs);
  if ((kind.output == Output::kOpen) != (kind.rule == kArrayRule)) {
    RefuseCall("a rule and an output that do not belong together");
  }
  const bool takes_params = TakesParams(kind.output);
  CheckCounts(attrs, takes_params, args.size(), rets.size());
  UpdateCall call{
      Signature(kind.rule, attrs.paths, attrs.replay ? 2 : 1, attrs.num_devices, attrs.shards)};
  call.kind = kind;
  call.token = Scalars<const Token*>(args, 0, ffi::DataType::S32, 2);
  call.count = Scalars<const int32_t*>(args, 1, ffi::DataType::S32, 1);
  const size_t num_hyperparams = AllRules()[kind.rule].hyperparams.size() +
                                 (takes_params ? kNumParamHyperparams : 0) +
                                 (kind.clips ? kNumClipHyperparams : 0);
  // XLA's compiler in jax 0.11.2 ends the process where an operand inside of a shard_map is empty.
  call.hyperparams =
      Scalars<const float*>(args, 2, ffi::DataType::F32, std::max<size_t>(num_hyperparams, 1));
  call.part = Scalars<const int32_t*>(args, 3, ffi::DataType::S32, 1);
  call.new_token = static_cast<Token*>(
      DataOf(**rets.get<ffi::AnyBuffer>(0), ffi::DataType::S32, 2, "the new token"));
  const size_t num_leaves = attrs.formats.size();
  for (const int8_t format : attrs.formats) ++call.ranges[format].count;
  std::array<int64_t, kFormats.size()> next = {};  // place of each format's next leaf
  for (size_t i = 1; i < call.ranges.size(); ++i) {
    next[i] = call.ranges[i].first = call.ranges[i - 1].first + call.ranges[i - 1].count;
  }
  call.leaves.resize(num_leaves);
  for (size_t i = 0; i < num_leaves; ++i) {
    call.leaves[next[attrs.formats[i]]++] =
        ParseLeaf(attrs, args, rets, i, kind.output, call.signature);
  }
  call.extent = call.signature.MakeExtent();
  call.fingerprint = call.signature.Fingerprint();
  Registry::Get().Remember(call.signature, call.fingerprint);
  return call;
}

}  // namespace paged_optax
