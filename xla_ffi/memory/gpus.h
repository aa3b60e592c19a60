// What the CUDA driver says of the GPUs of this machine. A build without CUDA code has these
// functions too, and they say so.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace paged_optax {

struct Gpu {
  std::string name;
  int major, minor;  // compute capability
  int64_t total_bytes;
  bool concurrent_managed;  // whether the CPU and the GPU can use managed memory together
  std::string pci_bus_id;
};

struct Gpus {
  int driver = 0;  // the newest CUDA that it knows: 1000 * major + 10 * minor; 0 if there is none
  std::vector<Gpu> gpus = {};
  std::string error = {};  // why there are none; empty if there are some
};

Gpus FindGpus();

// Bytes of device memory that neither XLA's pool nor anyone else holds.
int64_t FreeDeviceBytes(int device);

// Why the CPU and this GPU cannot read and write managed memory together; empty if they can.
std::string WhyNotManaged(int device);
// Makes WhyNotManaged give such a reason, for the tests.
void PretendNotManaged(bool pretend);

}  // namespace paged_optax
