// What a machine has room for, asked before anything is allocated.
#pragma once

#include <cstdint>
#include <string>

namespace paged_optax {

// Bytes of host memory that can still be had: the smaller of what the system reports available and
// what is left below the limits of the control groups this process is in.
int64_t AvailableHostBytes();

// Throws with the numbers and the remedy when `nbytes` more of host memory are not to be had:
// `available` are, less what was promised to others (memory/promises.h).
void CheckHostMemory(int64_t nbytes, int64_t available, int64_t promised);
// The same for the process's address space.
void CheckAddressSpace(int64_t nbytes);

// "1.5 GiB"
std::string FormatBytes(int64_t nbytes);

}  // namespace paged_optax
