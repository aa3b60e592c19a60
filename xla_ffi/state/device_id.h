// The name of a device of this process.
#pragma once

#include <cstdint>
#include <string>

namespace paged_optax {

enum class Platform : int8_t { kCpu, kCuda };

struct DeviceId {
  Platform platform;
  int ordinal;
  bool operator<(const DeviceId& other) const {
    return platform != other.platform ? platform < other.platform : ordinal < other.ordinal;
  }
  bool operator==(const DeviceId& other) const {
    return platform == other.platform && ordinal == other.ordinal;
  }
};

inline const char* Name(Platform platform) { return platform == Platform::kCpu ? "cpu" : "cuda"; }

inline std::string Name(DeviceId device) {
  return Name(device.platform) + (":" + std::to_string(device.ordinal));
}

}  // namespace paged_optax
