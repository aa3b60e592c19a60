// See crc32.h. A checksum is the remainder of a polynomial over GF(2), whose highest coefficient is
// in the lowest bit. So that of a part counts as often as x^(8 n) says if n bytes follow.
//
// References: M. Adler, crc32_combine of zlib; V. Gopal and others, "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009).
#include "base/crc32.h"

#include <array>
#include <cstddef>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paged_optax {
namespace {

constexpr uint32_t kPolynomial = 0xedb88320u;

constexpr uint32_t TimesX(uint32_t a) { return (a >> 1) ^ (a & 1 ? kPolynomial : 0); }

constexpr uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = TimesX(b);
  }
  return product;
}

// x^n.
constexpr uint32_t PowerOfX(uint64_t n) {
  uint32_t power = 0x80000000u, square = 0x40000000u;  // 1 and x
  for (; n != 0; n >>= 1) {
    if (n & 1) power = Multiply(power, square);
    square = Multiply(square, square);
  }
  return power;
}

using Tables = std::array<std::array<uint32_t, 256>, 16>;

// tables[n][b]: what a byte b contributes when n bytes follow it.
constexpr Tables MakeTables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = TimesX(crc);
    tables[0][byte] = crc;
  }
  for (size_t n = 1; n < tables.size(); ++n) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[n - 1][byte];
      tables[n][byte] = tables[0][crc & 255] ^ (crc >> 8);
    }
  }
  return tables;
}

constexpr Tables kTables = MakeTables();

// The remainder itself: without the inversions at the start and at the end.
uint32_t Remainder(uint32_t crc, const uint8_t* bytes, int64_t nbytes) {
  for (; nbytes >= 16; nbytes -= 16, bytes += 16) {
    uint8_t head[4];
    for (int i = 0; i < 4; ++i) head[i] = static_cast<uint8_t>(bytes[i] ^ (crc >> (8 * i)));
    uint32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum ^= kTables[15 - i][head[i]];
    for (int i = 4; i < 16; ++i) sum ^= kTables[15 - i][bytes[i]];
    crc = sum;
  }
  for (; nbytes > 0; --nbytes, ++bytes) crc = kTables[0][(crc ^ *bytes) & 255] ^ (crc >> 8);
  return crc;
}

#if defined(__x86_64__)
#define PAGED_CARRYLESS __attribute__((target("pclmul,sse4.1")))

// What moves 64 bits of a polynomial by so many more bits, less those that the product has anyway.
constexpr int64_t Shift(int bits) { return static_cast<int64_t>(PowerOfX(bits)) << 1; }
static_assert(Shift(512 + 32) == 0x154442bd4);  // k1 in the reference

// `lane` in front of the `distance` bits that end with `next`.
PAGED_CARRYLESS inline __m128i Fold(__m128i lane, __m128i shifts, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(lane, shifts, 0x00),
                                     _mm_clmulepi64_si128(lane, shifts, 0x11)),
                       next);
}

PAGED_CARRYLESS inline __m128i Load(const uint8_t* bytes) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

// As Remainder, of 64 bytes or more.
PAGED_CARRYLESS uint32_t FoldedRemainder(uint32_t crc, const uint8_t* bytes, int64_t nbytes) {
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = Load(bytes + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  const __m128i by_512 = _mm_set_epi64x(Shift(512 - 32), Shift(512 + 32));
  for (bytes += 64, nbytes -= 64; nbytes >= 64; bytes += 64, nbytes -= 64) {
    for (int i = 0; i < 4; ++i) lanes[i] = Fold(lanes[i], by_512, Load(bytes + 16 * i));
  }
  const __m128i by_128 = _mm_set_epi64x(Shift(128 - 32), Shift(128 + 32));
  for (int i = 1; i < 4; ++i) lanes[0] = Fold(lanes[0], by_128, lanes[i]);
  for (; nbytes >= 16; bytes += 16, nbytes -= 16) lanes[0] = Fold(lanes[0], by_128, Load(bytes));
  alignas(16) uint8_t last[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(last), lanes[0]);
  return Remainder(Remainder(0, last, 16), bytes, nbytes);
}
#endif

}  // namespace

uint32_t PlainCrc32(uint32_t crc, const uint8_t* bytes, int64_t nbytes) {
  return ~Remainder(~crc, bytes, nbytes);
}

uint32_t Crc32(uint32_t crc, const uint8_t* bytes, int64_t nbytes) {
#if defined(__x86_64__)
  static const bool can_fold = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (can_fold && nbytes >= 64) return ~FoldedRemainder(~crc, bytes, nbytes);
#endif
  return PlainCrc32(crc, bytes, nbytes);
}

uint32_t JoinCrc32(uint32_t first, uint32_t second, int64_t nbytes) {
  return Multiply(PowerOfX(8 * static_cast<uint64_t>(nbytes)), first) ^ second;
}

}  // namespace paged_optax
