// What a rule declares about its states, for formats; and lists of types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/portable.h"

namespace paged_optax {

// What a format may rely on when it stores a state.
enum class Role : int8_t {
  kSigned,       // of either sign: a mean of gradients
  kNonNegative,  // never negative: a mean of squares
  kAny,          // either: nothing is known of it, so each block tells
};

// For the arithmetic of a rule (rules/rule.h).
template <class Arithmetic>
inline constexpr int kNumStates = static_cast<int>(sizeof(Arithmetic::kRoles) / sizeof(Role));

// The place of the first state with a role; -1 if there is none.
template <class Arithmetic>
constexpr int FindState(Role role) {
  for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
    if (Arithmetic::kRoles[s] == role) return s;
  }
  return -1;
}

template <class Arithmetic>
inline constexpr int kFirstSigned = FindState<Arithmetic>(Role::kSigned);

// There is at most one state that is never negative.
template <class Arithmetic>
inline constexpr int kNonNegativeState = FindState<Arithmetic>(Role::kNonNegative);

// Whether nothing is known of the states.
template <class Arithmetic>
inline constexpr bool kIsAny = FindState<Arithmetic>(Role::kAny) >= 0;

// Of a state of which nothing is known, what holds for each value: it may have a sign. Without a
// look into kRoles, which device code cannot see.
template <class Arithmetic>
PAGED_HD constexpr Role RoleOf(int state) {
  return state == kNonNegativeState<Arithmetic> ? Role::kNonNegative : Role::kSigned;
}

// The types of a list, in order. A number in a signature or a program is a place in such a list.
template <class... T>
struct List {
  static constexpr int kSize = static_cast<int>(sizeof...(T));
};

template <class T>
struct Type {
  using type = T;
};

// Calls function(Type<T>()) for the type at `place`; does nothing if there is none.
template <class F, class... T>
void Visit(List<T...>, int place, F&& function) {
  int i = 0;
  ((i++ == place ? function(Type<T>()) : void()), ...);
}

// The size of the largest type in a list of them.
template <class... T>
constexpr size_t LargestSize() {
  size_t largest = 0;
  ((largest = sizeof(T) > largest ? sizeof(T) : largest), ...);
  return largest;
}

}  // namespace paged_optax
