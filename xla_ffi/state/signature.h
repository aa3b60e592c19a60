// What a call must have in common with the moments that it steps.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "formats/formats.h"
#include "layout/layout.h"
#include "state/leaf_names.h"

namespace paged_optax {

// The regions of an arena, by format.
struct Extent {
  std::array<Region, kFormats.size()> regions = {};

  int64_t NumBytes() const { return RoundUp(regions.back().end_byte, 512); }
};

class Signature {
 public:
  struct LeafInfo {
    int8_t format;
    std::vector<int64_t> dims;
    int64_t size;
    int64_t first_block;  // in the region of its format
  };

  // `rule` is a place in Rules; `paths` names the leaves; `num_devices` is how many devices the
  // program runs on; `shards` says which parts of the leaves they have.
  Signature(int8_t rule, int64_t paths, int32_t num_slots, int64_t num_devices,
            std::string_view shards)
      : rule_(rule),
        paths_(paths),
        num_slots_(num_slots),
        num_devices_(num_devices),
        shards_(shards) {}

  // Adds a leaf, in tree order. Returns the number of its first block in the region of its format.
  int64_t Append(int8_t format, const int64_t* dims, int64_t rank);

  // Says that residuals of the parameters are kept with the states.
  void KeepResiduals() { has_residuals_ = true; }

  uint64_t Fingerprint() const;
  std::vector<LeafInfo> Leaves() const;
  // Where the blocks of each format lie. Regions of formats that no leaf has are empty.
  Extent MakeExtent() const;
  int8_t rule() const { return rule_; }
  bool has_residuals() const { return has_residuals_; }
  int32_t num_slots() const { return num_slots_; }
  int64_t num_devices() const { return num_devices_; }

  // For the user: the first thing in which a call differs from the moments, whose leaves have these
  // names. Where the signatures are equal, the device has other parts of the leaves.
  static std::string Difference(const Signature& moments, const Signature& call,
                                const LeafNames& names);

 private:
  int8_t rule_;
  int64_t paths_;
  int32_t num_slots_;
  int64_t num_devices_;
  std::string shards_;
  std::vector<int64_t> words_;  // per leaf: format, rank, dims
  std::array<int64_t, kFormats.size()> num_blocks_ = {};
  bool has_residuals_ = false;
};

}  // namespace paged_optax
