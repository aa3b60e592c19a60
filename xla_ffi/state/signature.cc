// See signature.h.
#include "state/signature.h"

#include <sstream>

#include "base/status.h"

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
    if (moments[i].codec != call[i].codec) {
      const char* codecs[] = {"as float32", "in 8 bits, codec 'dynamic'",
                              "in 8 bits, codec 'ratio'"};
      text << "the moments of " << names[i] << " are stored "
           << codecs[static_cast<int>(moments[i].codec)] << " but this step wants them "
           << codecs[static_cast<int>(call[i].codec)];
      return text.str();
    }
  }
  return "";
}

}  // namespace

int64_t Signature::Append(Codec codec, const int64_t* dims, int64_t rank) {
  words_.push_back(static_cast<int64_t>(codec));
  words_.push_back(rank);
  words_.insert(words_.end(), dims, dims + rank);
  int64_t size = 1;
  for (int64_t i = 0; i < rank; ++i) size *= dims[i];
  int64_t& blocks = Is8Bit(codec) ? extent_.num_quantized_blocks : extent_.num_float32_blocks;
  const int64_t first_block = blocks;
  blocks += NumBlocks(size);
  if (blocks >= kMaxBlocks) {
    throw StatusError(
        StatusCode::kInvalidArgument,
        "a state of more than 10^12 elements on one device is not supported; shard it");
  }
  return first_block;
}

uint64_t Signature::Fingerprint() const {
  // FNV-1a over words, with a mix of the high bits.
  uint64_t hash = 0xcbf29ce484222325u ^ static_cast<uint64_t>(paths_);
  const auto mix = [&hash](int64_t word) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  mix(num_slots_);
  mix(num_devices_);
  mix(extent_.has_residuals);
  for (const char c : shards_) mix(c);
  for (const int64_t word : words_) mix(word);
  return hash;
}

std::vector<Signature::LeafInfo> Signature::Leaves() const {
  std::vector<LeafInfo> leaves;
  int64_t blocks[2] = {0, 0};
  for (size_t i = 0; i < words_.size(); i += 2 + words_[i + 1]) {
    LeafInfo leaf;
    leaf.codec = static_cast<Codec>(words_[i]);
    leaf.dims.assign(words_.begin() + i + 2, words_.begin() + i + 2 + words_[i + 1]);
    leaf.size = 1;
    for (const int64_t dim : leaf.dims) leaf.size *= dim;
    int64_t& next = blocks[Is8Bit(leaf.codec)];
    leaf.first_block = next;
    next += NumBlocks(leaf.size);
    leaves.push_back(std::move(leaf));
  }
  return leaves;
}

std::string Signature::Difference(const Signature& moments, const Signature& call,
                                  const LeafNames& leaf_names) {
  constexpr char kUntouched[] = "The moments were left as they were.";
  std::ostringstream text;
  if (moments.num_devices_ != call.num_devices_) {
    text << "the moments were made by a program on " << moments.num_devices_
         << " device(s) and this step runs on " << call.num_devices_
         << ". Moments do not move between devices: step with the parameters sharded as they were"
            " at the first step, or make a new state with init(params). "
         << kUntouched;
    return text.str();
  }
  if (moments.num_slots_ != call.num_slots_) {
    const char* names[] = {"replay=False", "replay=True"};
    text << "the moments were made with " << names[moments.num_slots_ - 1] << " and this step has "
         << names[call.num_slots_ - 1] << ". Make a new state with init(params). " << kUntouched;
    return text.str();
  }
  if (moments.extent_.has_residuals != call.extent_.has_residuals) {
    const char* who[] = {"the state", "this step"};
    const bool step_keeps = call.extent_.has_residuals;
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
