// Arrays that are kept as they are: the state of an optimizer that XLA steps (paged_optax/_any.py).
//
// This rule has no arithmetic. Its moments are loaded into XLA's memory, and others are stored in
// their place (step/array.h). Each array of the optimizer's state is a leaf.
#pragma once

#include "rules/rule.h"

namespace paged_optax {

struct Values {
  static constexpr Role kRoles[] = {Role::kAny};
  static constexpr bool kHasInitial = false;
  struct Coefficients {};
};

struct Array {
  using Arithmetic = Values;
  static constexpr char kName[] = "array";
  static constexpr std::array kStates = {"state"};
  static constexpr std::array<HyperparamInfo, 0> kHyperparams = {};
  static constexpr std::array<const char*, 0> kFlags = {};

  PAGED_HD static Values::Coefficients Prepare(const float*, int32_t, uint32_t, BadElement) {
    return {};
  }
};

}  // namespace paged_optax
