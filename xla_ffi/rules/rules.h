// The list of rules. A program names a rule by its place here.
#pragma once

#include <string>
#include <vector>

#include "rules/adam.h"
#include "rules/lion.h"

namespace paged_optax {

using Rules = List<Adam, Lion>;

// What the rest of the library knows of a rule.
struct RuleInfo {
  std::string name;
  std::vector<StateInfo> states;
  std::vector<HyperparamInfo> hyperparams;
  std::vector<std::string> flags;
};

template <class... Rule>
std::vector<RuleInfo> DescribeRules(List<Rule...>) {
  return {{Rule::kName,
           {std::begin(Rule::kStates), std::end(Rule::kStates)},
           {std::begin(Rule::kHyperparams), std::end(Rule::kHyperparams)},
           {std::begin(Rule::kFlags), std::end(Rule::kFlags)}}...};
}

inline const std::vector<RuleInfo>& AllRules() {
  static const std::vector<RuleInfo>* rules = new std::vector<RuleInfo>(DescribeRules(Rules()));
  return *rules;
}

}  // namespace paged_optax
