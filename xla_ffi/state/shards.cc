// See shards.h.
#include "state/shards.h"

#include <limits>

#include "base/status.h"

namespace paged_optax {
namespace {

[[noreturn]] void Refuse() {
  throw StatusError(StatusCode::kInvalidArgument,
                    "malformed call: the text that says which parts the devices have");
}

// A number, or a list of nodes.
struct Node {
  int64_t number = -1;  // of a list
  std::vector<Node> items = {};

  const std::vector<Node>& List() const { return number < 0 ? items : (Refuse(), items); }
  const std::vector<Node>& List(size_t size) const {
    return List().size() == size ? items : (Refuse(), items);
  }
  int64_t Number() const { return number >= 0 ? number : (Refuse(), 0); }
};

// The little of JSON that the text is made of: lists, and numbers that are not negative.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Node Parse() {
    Node node = ParseNode(0);
    if (Peek() != '\0') Refuse();
    return node;
  }

 private:
  char Peek() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool Take(char wanted) {
    if (Peek() != wanted) return false;
    ++at_;
    return true;
  }

  Node ParseNode(int depth) {
    if (Take('[')) return ParseItems(depth);
    if (Peek() < '0' || Peek() > '9') Refuse();
    Node node{0};
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      node.number = node.number * 10 + (text_[at_] - '0');
      if (node.number > std::numeric_limits<int32_t>::max()) Refuse();
    }
    return node;
  }

  Node ParseItems(int depth) {
    Node node;
    if (depth > 8) Refuse();
    if (Take(']')) return node;
    do {
      node.items.push_back(ParseNode(depth + 1));
    } while (Take(','));
    if (!Take(']')) Refuse();
    return node;
  }

  std::string_view text_;
  size_t at_ = 0;
};

// `cuts`: of each dimension a list of (parts, stride), the slowest varying first.
LeafBox BoxOf(const std::vector<int64_t>& dims, const Node& cuts, int32_t position) {
  LeafBox leaf{dims, {std::vector<int64_t>(dims.size(), 0), dims}};
  for (size_t d = 0; d < dims.size(); ++d) {
    int64_t part = 0, num_parts = 1;
    for (const Node& cut : cuts.List(dims.size())[d].List()) {
      const int64_t parts = cut.List(2)[0].Number(), stride = cut.List(2)[1].Number();
      if (parts == 0 || stride == 0) Refuse();
      part = part * parts + position / stride % parts;
      num_parts *= parts;
      if (num_parts > std::numeric_limits<int32_t>::max()) Refuse();
    }
    leaf.whole[d] *= num_parts;
    leaf.box.start[d] = dims[d] * part;
  }
  return leaf;
}

// FNV-1a over words.
void Mix(int64_t word, uint64_t* hash) {
  *hash = (*hash ^ static_cast<uint64_t>(word)) * 0x100000001b3u;
  *hash ^= *hash >> 29;
}

void Mix(const Node& node, uint64_t* hash) {
  Mix(node.number, hash);
  Mix(static_cast<int64_t>(node.items.size()), hash);
  for (const Node& item : node.items) Mix(item, hash);
}

// How leaf `i` of so many is cut.
const Node& CutsOf(const Node& text, size_t i, size_t num_leaves) {
  const std::vector<Node>& kinds = text.List(2)[0].List();
  const size_t kind = text.List(2)[1].List(num_leaves)[i].Number();
  return kind < kinds.size() ? kinds[kind] : (Refuse(), text);
}

}  // namespace

std::vector<uint64_t> StampsOf(const std::vector<Signature::LeafInfo>& leaves,
                               std::string_view shards) {
  Node text;
  if (!shards.empty()) text = Parser(shards).Parse();
  std::vector<uint64_t> stamps;
  for (size_t i = 0; i < leaves.size(); ++i) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const int64_t dim : leaves[i].dims) Mix(dim, &hash);
    if (!shards.empty()) Mix(CutsOf(text, i, leaves.size()), &hash);
    stamps.push_back(hash);
  }
  return stamps;
}

std::optional<std::vector<LeafBox>> FindBoxes(const std::vector<Signature::LeafInfo>& leaves,
                                              int64_t num_devices, std::string_view shards,
                                              int32_t part) {
  if (num_devices != 1 && shards.empty()) return std::nullopt;
  if (part < 0) Refuse();
  Node text;
  if (!shards.empty()) text = Parser(shards).Parse();
  std::vector<LeafBox> boxes;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const std::vector<int64_t>& dims = leaves[i].dims;
    if (shards.empty()) {
      boxes.push_back({dims, {std::vector<int64_t>(dims.size(), 0), dims}});
      continue;
    }
    boxes.push_back(BoxOf(dims, CutsOf(text, i, leaves.size()), part));
  }
  return boxes;
}

}  // namespace paged_optax
