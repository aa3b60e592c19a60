// See signature.h.
#include "state/signature.h"

#include <sstream>

#include "base/status.h"
#include "rules/rules.h"

namespace paged_optax {
namespace {

std::string ShapeText(const Signature::LeafInfo& leaf) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < leaf.dims.size(); ++i) {
    text << (i ? ", " : "") << leaf.dims[i] << (leaf.dims.size() == 1 ? "," : "");
  }
  text << ")";
  return text.str();
}

// Empty if the leaves agree.
std::string LeafDifference(const std::vector<Signature::LeafInfo>& moments,
                           const std::vector<Signature::LeafInfo>& call, const LeafNames& names) {
  std::ostringstream text;
  if (moments.size() != call.size()) {
    text << "the moments belong to " << moments.size() << " leaves but the gradients have "
         << call.size();
    return text.str();
  }
  for (size_t i = 0; i < moments.size(); ++i) {
    if (moments[i].dims != call[i].dims) {
      text << "the moments of " << names[i] << " have shape " << ShapeText(moments[i])
           << " but its gradient has shape " << ShapeText(call[i]);
      return text.str();
    }
    if (moments[i].format != call[i].format) {
      text << "the moments of " << names[i] << " are stored in the format '"
           << kFormats[moments[i].format].name << "' but this step wants them in '"
           << kFormats[call[i].format].name << "'";
      return text.str();
    }
  }
  return "";
}

}  // namespace

int64_t Signature::Append(int8_t format, const int64_t* dims, int64_t rank) {
  if (format < 0 || format >= static_cast<int>(kFormats.size())) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "there is no format number " + std::to_string(format));
  }
  words_.push_back(format);
  words_.push_back(rank);
  words_.insert(words_.end(), dims, dims + rank);
  int64_t size = 1;
  for (int64_t i = 0; i < rank; ++i) size *= dims[i];
  const int64_t first_block = num_blocks_[format];
  num_blocks_[format] += NumBlocks(size);
  if (num_blocks_[format] >= kMaxBlocks) {
    throw StatusError(
        StatusCode::kInvalidArgument,
        "a state of more than 10^12 elements on one device is not supported; shard it");
  }
  return first_block;
}

Extent Signature::MakeExtent() const {
  Extent extent;
  int64_t end = 0;
  for (size_t i = 0; i < kFormats.size(); ++i) {
    const int32_t num_states = static_cast<int32_t>(AllRules()[rule_].states.size());
    const BlockShape shape{num_states, kFormats[i].state_bytes,
                           kFormats[i].words_per_state * num_states,
                           has_residuals_ ? static_cast<int32_t>(kResidualBytes) : 0};
    extent.regions[i] = MakeRegion(shape, num_blocks_[i], end);
    end = extent.regions[i].end_byte;
  }
  return extent;
}

uint64_t Signature::Fingerprint() const {
  // FNV-1a over words, with a mix of the high bits.
  uint64_t hash = 0xcbf29ce484222325u ^ static_cast<uint64_t>(paths_);
  const auto mix = [&hash](int64_t word) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  mix(rule_);
  mix(num_slots_);
  mix(num_devices_);
  mix(has_residuals_);
  for (const char c : shards_) mix(c);
  for (const int64_t word : words_) mix(word);
  return hash;
}

std::vector<Signature::LeafInfo> Signature::Leaves() const {
  std::vector<LeafInfo> leaves;
  std::array<int64_t, kFormats.size()> blocks = {};
  for (size_t i = 0; i < words_.size(); i += 2 + words_[i + 1]) {
    LeafInfo leaf;
    leaf.format = static_cast<int8_t>(words_[i]);
    leaf.dims.assign(words_.begin() + i + 2, words_.begin() + i + 2 + words_[i + 1]);
    leaf.size = 1;
    for (const int64_t dim : leaf.dims) leaf.size *= dim;
    int64_t& next = blocks[leaf.format];
    leaf.first_block = next;
    next += NumBlocks(leaf.size);
    leaves.push_back(std::move(leaf));
  }
  return leaves;
}

std::string Signature::Difference(const Signature& moments, const Signature& call,
                                  const LeafNames& leaf_names) {
  constexpr char kUntouched[] =
      "The moments were left as they were: paged_optax.newest(opt_state) has them still, and "
      "paged_optax.release(opt_state) frees them.";
  std::ostringstream text;
  if (moments.num_devices_ != call.num_devices_) {
    text << "the moments were made by a program on " << moments.num_devices_
         << " device(s) and this step runs on " << call.num_devices_
         << ". Moments do not move between devices: step with the parameters sharded as they were"
            " at the first step, or make a new state with init(params). "
         << kUntouched;
    return text.str();
  }
  if (moments.rule_ != call.rule_) {
    text << "the state belongs to the optimizer '" << AllRules()[moments.rule_].name
         << "' and this step is one of '" << AllRules()[call.rule_].name
         << "'. Make a new state with init(params). " << kUntouched;
    return text.str();
  }
  if (moments.num_slots_ != call.num_slots_) {
    const char* names[] = {"replay=False", "replay=True"};
    text << "the moments were made with " << names[moments.num_slots_ - 1] << " and this step has "
         << names[call.num_slots_ - 1] << ". Make a new state with init(params). " << kUntouched;
    return text.str();
  }
  if (moments.has_residuals_ != call.has_residuals_) {
    const char* who[] = {"the state", "this step"};
    const bool step_keeps = call.has_residuals_;
    text << who[step_keeps] << " keeps residuals of 16-bit parameters and " << who[!step_keeps]
         << " does not (was param_rounding='compensated' or the parameters' dtype changed?). Make a"
            " new state with init(params). "
         << kUntouched;
    return text.str();
  }
  const std::string difference = LeafDifference(moments.Leaves(), call.Leaves(), leaf_names);
  if (difference.empty() && moments.shards_ != call.shards_) {
    text << "the gradients are sharded differently from the first step, so devices would update"
            " parts whose moments they do not hold. Keep the parameters' sharding and pass them to"
            " update (or gradients sharded as before), or make a new state with init(params). "
         << kUntouched;
    return text.str();
  }
  if (difference.empty() && moments.paths_ == call.paths_) {
    text << "the devices are in another order than at the first step, so they would update parts of"
            " the parameters whose moments they do not hold. Use a mesh with the devices in their"
            " former order, or make a new state with init(params). "
         << kUntouched;
    return text.str();
  }
  text << (difference.empty() ? "the gradients have the shapes that the moments were made for, but"
                                " other names or another structure"
                              : difference)
       << " (was the model, its sharding or the optimizer's `quantization` changed?). Make a new"
          " state with init(params). "
       << kUntouched;
  return text.str();
}

}  // namespace paged_optax
