// The checksum of zlib, PNG and Python's zlib.crc32 (ISO 3309).
#pragma once

#include <cstdint>

namespace paged_optax {

// Of everything so far, from that of what came before; 0 at the start. 64 bytes at a time where the
// processor multiplies polynomials, and 16 bytes at a time elsewhere.
uint32_t Crc32(uint32_t crc, const uint8_t* bytes, int64_t nbytes);

// Without those instructions, for tests.
uint32_t PlainCrc32(uint32_t crc, const uint8_t* bytes, int64_t nbytes);

// Of two parts together, from that of each; the second one has `nbytes`.
uint32_t JoinCrc32(uint32_t first, uint32_t second, int64_t nbytes);

}  // namespace paged_optax
