// The checksum of zlib, PNG and Python's zlib.crc32 (ISO 3309), sixteen bytes at a time.
#pragma once

#include <array>
#include <cstdint>

namespace paged_optax {
namespace internal {

using Crc32Tables = std::array<std::array<uint32_t, 256>, 16>;

// tables[n][b]: what a byte b contributes when n bytes follow it.
constexpr Crc32Tables MakeCrc32Tables() {
  Crc32Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1 ? 0xedb88320u : 0) ^ (crc >> 1);
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

inline constexpr Crc32Tables kCrc32Tables = MakeCrc32Tables();

}  // namespace internal

// Of everything so far, from that of what came before; 0 at the start.
inline uint32_t Crc32(uint32_t crc, const uint8_t* bytes, int64_t nbytes) {
  const internal::Crc32Tables& tables = internal::kCrc32Tables;
  crc = ~crc;
  for (; nbytes >= 16; nbytes -= 16, bytes += 16) {
    uint8_t head[4];
    for (int i = 0; i < 4; ++i) head[i] = static_cast<uint8_t>(bytes[i] ^ (crc >> (8 * i)));
    uint32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum ^= tables[15 - i][head[i]];
    for (int i = 4; i < 16; ++i) sum ^= tables[15 - i][bytes[i]];
    crc = sum;
  }
  for (; nbytes > 0; --nbytes, ++bytes) crc = tables[0][(crc ^ *bytes) & 255] ^ (crc >> 8);
  return ~crc;
}

}  // namespace paged_optax
