// The list of rules. A program names a rule by its place here.
#pragma once

#include <string>
#include <vector>

#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/ema.h"
#include "rules/lion.h"
#include "rules/rms.h"
#include "rules/stddev.h"
#include "rules/trace.h"

namespace paged_optax {

using Rules = List<Adam, Lion, Trace, Ema, Muon, Rms, Rss, StdDev, AdEMAMix>;

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
