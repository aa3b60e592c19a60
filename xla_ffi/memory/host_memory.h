// What the two kinds of memory on the CPU have in common; and the one whose pages are those of a
// file.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "memory/memory.h"

namespace paged_optax {

// Throws "<what> (<error>). <remedy> Nothing was allocated."
[[noreturn]] void RefuseMemory(const std::string& what, int error, const std::string& remedy);

// Pages for moments, which no forked process gets: it would share them, or keep a copy alive.
uint8_t* MapMemory(int64_t nbytes, int flags, int fd);

// How many bytes of it are in RAM. All, if that is not known.
int64_t MappedBytes(const uint8_t* data, int64_t nbytes);

std::unique_ptr<Memory> MakeFileMemory(const Geometry& geometry, const std::string& directory);

}  // namespace paged_optax
