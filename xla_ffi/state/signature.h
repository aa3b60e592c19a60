// What a call must have in common with the moments that it steps.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "layout/layout.h"
#include "state/leaf_names.h"

namespace paged_optax {

class Signature {
 public:
  struct LeafInfo {
    Codec codec;
    std::vector<int64_t> dims;
    int64_t size;
    int64_t first_block;
  };

  // `paths` names the leaves; `num_devices` is how many devices the program runs on; `shards` says
  // which parts of the leaves they have.
  Signature(int64_t paths, int32_t num_slots, int64_t num_devices, std::string_view shards)
      : paths_(paths), num_slots_(num_slots), num_devices_(num_devices), shards_(shards) {}

  // Adds a leaf, in tree order. Returns the number of its first block among those of its codec.
  int64_t Append(Codec codec, const int64_t* dims, int64_t rank);

  // Says that residuals of the parameters are kept with the moments.
  void KeepResiduals() { extent_.has_residuals = true; }

  uint64_t Fingerprint() const;
  std::vector<LeafInfo> Leaves() const;
  const ArenaExtent& extent() const { return extent_; }
  int32_t num_slots() const { return num_slots_; }
  int64_t num_devices() const { return num_devices_; }

  // For the user: the first thing in which a call differs from the moments, whose leaves have these
  // names. Where the signatures are equal, the device has other parts of the leaves.
  static std::string Difference(const Signature& moments, const Signature& call,
                                const LeafNames& names);

 private:
  int64_t paths_;
  int32_t num_slots_;
  int64_t num_devices_;
  std::string shards_;
  std::vector<int64_t> words_;  // per leaf: codec, rank, dims
  ArenaExtent extent_;
};

}  // namespace paged_optax
