// What arithmetic for host and device needs of the compiler: a macro for such functions, bit casts,
// and a few operations that the two sides spell differently to be fast.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PAGED_HD __host__ __device__ __forceinline__
#else
#define PAGED_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define PAGED_UNROLL _Pragma("unroll")
#else
#define PAGED_UNROLL
#endif

namespace paged_optax {

PAGED_HD uint32_t BitsOf(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

PAGED_HD float FloatOf(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

PAGED_HD float Abs(float x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);  // costs nothing: instructions can take the magnitude of an operand
#else
  return FloatOf(BitsOf(x) & 0x7fffffffu);
#endif
}

// Neither is NaN.
PAGED_HD float Max(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, as one instruction on a GPU, and not one of those for shifts and logic, of which it
// runs half as many. A compiler that sees a power of two would take these.
PAGED_HD uint32_t MultiplyAdd(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return a * b + c;
#endif
}

// The upper half of a * b, plus c: one instruction on a GPU.
PAGED_HD uint32_t MultiplyHighAdd(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("mad.hi.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32) + c;
#endif
}

#if defined(__CUDACC__)
// Instructions that move bytes have room for one constant, which says where bytes go. Of a number
// that it knew, the compiler would make that constant, and copy the other from register to
// register each time.
[[maybe_unused]] static __constant__ uint32_t kBitsOf128 = 0x43000000;
#endif

// 128 + x 2^-16, of the lower 16 bits of x.
PAGED_HD float Plus128(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return FloatOf(__byte_perm(x, kBitsOf128, 0x7610));
#else
  return FloatOf(0x43000000u | (x & 0xffffu));
#endif
}

// Byte k of a row that starts at a multiple of 4 bytes. On a GPU one instruction, of four bytes in
// a register.
PAGED_HD uint32_t ByteOf(const uint8_t* bytes, int k) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(reinterpret_cast<const uint32_t*>(bytes)[k / 4], 0, 0x4440 + k % 4);
#else
  return bytes[k];
#endif
}

// The number of kBits bits, in two's complement, that such a byte is. On a GPU one instruction, of
// 8 bits.
template <int kBits>
PAGED_HD float SignedOf(const uint8_t* bytes, int k) {
  constexpr int32_t kSign = 1 << (kBits - 1);
#if defined(__CUDA_ARCH__)
  // Four numbers at once take the bits above from their sign.
  const uint32_t four = reinterpret_cast<const uint32_t*>(bytes)[k / 4];
  const uint32_t extended = four + (four & kSign * 0x01010101u) * ((256 - 2 * kSign) / kSign);
  float number;
  asm("{.reg .s32 n; bfe.s32 n, %1, %2, 8; cvt.rn.f32.s32 %0, n;}"
      : "=f"(number)
      : "r"(extended), "r"(8 * (k % 4)));
  return number;
#else
  return static_cast<float>((bytes[k] ^ kSign) - kSign);
#endif
}

// The bits of the largest float that is not above x, which is not 0.
PAGED_HD uint32_t BitsBelow(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return BitsOf(__uint2float_rz(x));
#else
  const uint32_t log2 = 31 - static_cast<uint32_t>(__builtin_clz(x));
  const uint32_t fraction = log2 > 23 ? x >> (log2 - 23) : x << (23 - log2);
  return ((126 + log2) << 23) + fraction;  // the leading 1 adds one to the exponent
#endif
}

// found[k] = table[places[k]], of entries of 4 bytes. A compiler that vectorizes this takes vectors
// of places apart and puts what it finds together again. To look up two at a time is faster: they
// share a load of their places and a store, and the host loads and stores only so often in a cycle.
// Counting pair by pair would be a third of the instructions, so there are four in a round.
template <class T, class Place, int K>
PAGED_HD void LookUp(const T* table, const Place (&places)[K], T (&found)[K]) {
#if !defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4 && K % 8 == 0) {
    // Whatever they are: one instruction loads a float and puts it next to another.
    using Entry __attribute__((may_alias)) = float;
    using Pair = float __attribute__((vector_size(8)));
    const auto* entries = reinterpret_cast<const Entry*>(table);
    for (int k = 0; k < K; k += 8) {
      for (int i = k; i < k + 8; i += 2) {
        uint64_t two = 0;
        std::memcpy(&two, &places[i], 2 * sizeof(Place));
        const Pair pair = {entries[static_cast<Place>(two)], entries[two >> 8 * sizeof(Place)]};
        std::memcpy(&found[i], &pair, sizeof(pair));
      }
    }
    return;
  }
#endif
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) found[k] = table[places[k]];
}

// condition ? a : b. On the host without a branch, however the compiler would merge it with others:
// branches keep it from vectorizing a loop.
PAGED_HD uint32_t Select(bool condition, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return b ^ ((a ^ b) & mask);
#endif
}

PAGED_HD float Select(bool condition, float a, float b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  return FloatOf(Select(condition, BitsOf(a), BitsOf(b)));
#endif
}

// The least and the largest of bit patterns of floats that are not negative, which order them as
// their values do.
struct BitRange {
  uint32_t least, largest;
};

template <int K>
PAGED_HD BitRange RangeOf(const float (&values)[K]) {
  BitRange range{0xffffffffu, 0};
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const uint32_t bits = BitsOf(values[k]);
    range.least = bits < range.least ? bits : range.least;
    range.largest = bits > range.largest ? bits : range.largest;
  }
  return range;
}

// That of a block, of which the values are a lane. `block` turns extremes of a lane into those of
// its block.
template <int K, class Block>
PAGED_HD BitRange RangeOf(const float (&values)[K], Block block) {
  const BitRange range = RangeOf(values);
  return {block.Min(range.least), block.Max(range.largest)};
}

// The least bit pattern of those values whose `others` are not 0.
template <int K>
PAGED_HD uint32_t LeastWhereNonZero(const float (&values)[K], const float (&others)[K]) {
  uint32_t least = 0xffffffffu;
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const uint32_t bits = Select(others[k] == 0.0f, 0xffffffffu, BitsOf(values[k]));
    least = bits < least ? bits : least;
  }
  return least;
}

template <int K>
PAGED_HD float LargestMagnitude(const float (&values)[K]) {
#if defined(__CUDA_ARCH__)
  float largest = 0.0f;
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) largest = fmaxf(largest, fabsf(values[k]));
  return largest;
#else
  uint32_t largest = 0;  // an order of evaluation that a compiler may change, to vectorize
  for (int k = 0; k < K; ++k) {
    const uint32_t bits = BitsOf(values[k]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return FloatOf(largest);
#endif
}

}  // namespace paged_optax
