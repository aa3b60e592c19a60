// The paths of a state's leaves, so that messages and reports can name them.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace paged_optax {

class LeafNames {
 public:
  LeafNames() = default;

  // `joined`: one path a line, in tree order. If there are not `num_leaves` of them, the names
  // count as unknown.
  LeafNames(std::string_view joined, size_t num_leaves) {
    for (size_t begin = 0, end; begin <= joined.size(); begin = end + 1) {
      end = std::min(joined.find('\n', begin), joined.size());
      paths_.emplace_back(joined.substr(begin, end - begin));
    }
    if (paths_.size() != num_leaves) paths_.clear();
  }

  // "['dense']['kernel']"; "leaf 3" where the path is unknown, or empty as that of a bare array.
  std::string operator[](size_t leaf) const {
    return leaf < paths_.size() && !paths_[leaf].empty() ? paths_[leaf]
                                                         : "leaf " + std::to_string(leaf);
  }

  // Empty where they are unknown.
  const std::vector<std::string>& paths() const { return paths_; }

 private:
  std::vector<std::string> paths_;
};

}  // namespace paged_optax
