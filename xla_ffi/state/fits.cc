// See fits.h.
#include "state/fits.h"

#include "base/status.h"
#include "rules/rules.h"
#include "state/shards.h"

namespace paged_optax {
namespace {

[[noreturn]] void Refuse(const std::string& difference) {
  throw StatusError(StatusCode::kFailedPrecondition,
                    "paged_optax: this optimizer state was restored from a checkpoint " +
                        difference +
                        ". The restored moments are as they were; nothing was allocated.");
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]) + (shape.size() == 1 ? "," : "");
  }
  return text + ")";
}

void CheckLeaf(const Source& source, size_t i, const std::vector<int64_t>& whole, int8_t format,
               const std::vector<std::string>& names) {
  const SourceLeaf& leaf = source.leaves[i];
  if (i < names.size() && !leaf.name.empty() && !names[i].empty() && leaf.name != names[i]) {
    Refuse("whose leaf " + std::to_string(i) + " is " + leaf.name + ", and in this step it is " +
           names[i] + " (was the model changed?)");
  }
  if (leaf.shape != whole) {
    Refuse("whose moments of " + source.NameOf(i) + " have shape " + ShapeText(leaf.shape) +
           ", and in this step it has shape " + ShapeText(whole) + " (was the model changed?)");
  }
  if (leaf.format != format && !source.convert) {
    Refuse("whose moments of " + source.NameOf(i) + " are stored in the format '" +
           kFormats[leaf.format].name + "', and this step wants them in '" + kFormats[format].name +
           "' (was the optimizer's `quantization` changed? load_moments(..., convert=True) "
           "converts)");
  }
}

}  // namespace

void CheckFits(const Source& source, const Request& request) {
  const Signature& signature = *request.signature;
  if (source.rule != signature.rule()) {
    Refuse("of the optimizer '" + AllRules()[source.rule].name + "', and this step is one of '" +
           AllRules()[signature.rule()].name + "'");
  }
  const std::vector<Signature::LeafInfo> leaves = signature.Leaves();
  if (leaves.size() != source.leaves.size()) {
    Refuse("whose moments belong to " + std::to_string(source.leaves.size()) +
           " leaves, and this step has " + std::to_string(leaves.size()) +
           " (was the model changed?)");
  }
  if (source.has_residuals != signature.has_residuals() &&
      (source.has_residuals || !source.convert)) {
    Refuse(std::string("that ") + (source.has_residuals ? "has" : "does not have") +
           " residuals of 16-bit parameters, and this step " +
           (signature.has_residuals() ? "keeps some" : "keeps none") +
           " (was param_rounding='compensated' or the parameters' dtype changed?)");
  }
  const auto boxes = FindBoxes(leaves, signature.num_devices(), request.shards, request.part);
  if (!boxes) {
    Refuse(
        "and this step does not say which part of the parameters each device has (inside "
        "jax.shard_map or jax.pmap, or on a mesh with axes of several types). Run the first "
        "update under jax.jit with sharded arrays on a mesh of one type");
  }
  const std::vector<std::string> names = LeafNames(request.names, leaves.size()).paths();
  for (size_t i = 0; i < leaves.size(); ++i) {
    CheckLeaf(source, i, (*boxes)[i].whole, leaves[i].format, names);
  }
}

}  // namespace paged_optax
