// The list of rules. A program names a rule by its place here.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/array.h"
#include "rules/ema.h"
#include "rules/lion.h"
#include "rules/rms.h"
#include "rules/stddev.h"
#include "rules/trace.h"

namespace paged_optax {

using Rules = List<Adam, Lion, Trace, Ema, Muon, Rms, Rss, StdDev, AdEMAMix, Array>;

struct StateInfo {
  const char* name;
  Role role;
};

// What the rest of the library knows of a rule.
struct RuleInfo {
  std::string name;
  std::vector<StateInfo> states;
  std::vector<HyperparamInfo> hyperparams;
  std::vector<std::string> flags;
};

// The place of a rule in a list.
template <class Wanted, class... Rule>
constexpr int8_t PlaceOf(List<Rule...>) {
  int8_t place = 0;
  (void)((std::is_same_v<Wanted, Rule> ? true : (++place, false)) || ...);
  return place;
}

inline constexpr int8_t kArrayRule = PlaceOf<Array>(Rules());

template <class Rule>
RuleInfo DescribeRule() {
  using Arithmetic = typename Rule::Arithmetic;
  static_assert(Rule::kStates.size() == kNumStates<Arithmetic>, "a name for each state");
  RuleInfo info{Rule::kName,
                {},
                {Rule::kHyperparams.begin(), Rule::kHyperparams.end()},
                {Rule::kFlags.begin(), Rule::kFlags.end()}};
  for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
    info.states.push_back({Rule::kStates[s], RoleOf<Arithmetic>(s)});
  }
  return info;
}

template <class... Rule>
std::vector<RuleInfo> DescribeRules(List<Rule...>) {
  return {DescribeRule<Rule>()...};
}

inline const std::vector<RuleInfo>& AllRules() {
  static const std::vector<RuleInfo>* rules = new std::vector<RuleInfo>(DescribeRules(Rules()));
  return *rules;
}

}  // namespace paged_optax
