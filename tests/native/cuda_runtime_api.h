// The part of the CUDA runtime that paged_optax calls, made of ordinary memory: everything is done
// when a call returns. So what the host does around a GPU can run under sanitizers, and each call
// can fail in turn, on a machine without a GPU. Kernels are in fake_step.cc.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorLaunchOutOfResources = 701
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDefault };
enum cudaMemLocationType { cudaMemLocationTypeDevice, cudaMemLocationTypeHost };
enum cudaMemoryAdvise {
  cudaMemAdviseSetPreferredLocation,
  cudaMemAdviseSetAccessedBy,
  cudaMemAdviseUnsetAccessedBy
};
enum cudaDeviceAttr { cudaDevAttrConcurrentManagedAccess, cudaDevAttrMemoryPoolsSupported };
enum cudaMemAllocationType { cudaMemAllocationTypePinned };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum {
  cudaEventDisableTiming = 2,
  cudaStreamNonBlocking = 1,
  cudaMemAttachGlobal = 1,
  cudaEnableDefault = 0
};
enum { cudaHostAllocMapped = 2, cudaHostAllocPortable = 1, cudaHostRegisterPortable = 1 };

struct CUstream_st {};
struct CUevent_st {};
struct CUpool_st {};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaMemPool_t = CUpool_st*;
using cudaHostFn_t = void (*)(void*);
inline CUstream_st legacy_stream;
inline const cudaStream_t cudaStreamLegacy = &legacy_stream;

struct cudaMemLocation {
  cudaMemLocationType type;
  int id;
};
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  cudaMemLocation location;
};
struct cudaDeviceProp {
  char name[8];
  int major, minor;
  size_t totalGlobalMem;
  int concurrentManagedAccess;
};

namespace fake_cuda {

// What is allocated, by the memory that it counts for.
inline std::atomic<int64_t> device_bytes{0}, host_bytes{0}, taken_by_others{0};
// Which question for free memory from now on finds none; 0 for no such.
inline std::atomic<int> full_at_question{0};
inline constexpr int64_t kDeviceBytes = int64_t{1} << 30;
inline thread_local int device = 0;
// Called where somebody waits for a device, or for its stream of steps, which is null.
inline void (*on_wait)(int device) = nullptr;

// Blocks are used again: new pages take a sanitizer long.
inline std::mutex mutex;
inline std::multimap<size_t, void*> unused;
inline std::map<void*, size_t> used;
inline std::map<void*, size_t> pinned;  // memory of others

inline cudaError_t Allocate(void** data, size_t nbytes, std::atomic<int64_t>& count) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = unused.find(nbytes);
  *data = found == unused.end() ? std::malloc(nbytes) : found->second;
  if (found != unused.end()) unused.erase(found);
  used[*data] = nbytes;
  count += static_cast<int64_t>(nbytes);
  return cudaSuccess;
}

inline cudaError_t Free(void* data, std::atomic<int64_t>& count) {
  if (data == nullptr) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = used.find(data);
  if (found == used.end()) std::abort();  // freed twice
  count -= static_cast<int64_t>(found->second);
  unused.emplace(found->second, data);
  used.erase(found);
  return cudaSuccess;
}

// How many ranges are pinned. It reads them, because nobody may have freed them.
inline int NumPinned() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [data, nbytes] : pinned) {
    for (size_t at = 0; at < nbytes; at += 4096) {
      (void)*(static_cast<const volatile char*>(data) + at);
    }
  }
  return static_cast<int>(pinned.size());
}

// Of much memory only the samples that fake_step.h looks at: the rest would take a sanitizer long.
inline cudaError_t Copy(void* to, const void* from, size_t nbytes) {
  constexpr size_t kStride = 1 << 20, kSample = 64;
  if (nbytes < kStride) return std::memcpy(to, from, nbytes), cudaSuccess;
  for (size_t at = 0; at + kSample <= nbytes; at += kStride) {
    std::memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, kSample);
  }
  return cudaSuccess;
}

}  // namespace fake_cuda

inline const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorFake"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) { return *device = fake_cuda::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return fake_cuda::device = device, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  return *properties = {"fake", 9, 0, static_cast<size_t>(fake_cuda::kDeviceBytes), 1}, cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char* id, int, int) { return *id = '\0', cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 1, cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult*) {
  return *function = nullptr, cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  if (fake_cuda::on_wait != nullptr) fake_cuda::on_wait(fake_cuda::device);
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, size_t nbytes) {
  return fake_cuda::Allocate(data, nbytes, fake_cuda::device_bytes);
}
inline cudaError_t cudaFree(void* data) { return fake_cuda::Free(data, fake_cuda::device_bytes); }
inline cudaError_t cudaMallocManaged(void** data, size_t nbytes, unsigned) {
  return cudaMalloc(data, nbytes);
}
inline cudaError_t cudaHostAlloc(void** data, size_t nbytes, unsigned) {
  return fake_cuda::Allocate(data, nbytes, fake_cuda::host_bytes);
}
inline cudaError_t cudaFreeHost(void* data) { return fake_cuda::Free(data, fake_cuda::host_bytes); }
inline cudaError_t cudaHostRegister(void* data, size_t nbytes, unsigned) {
  const std::lock_guard<std::mutex> lock(fake_cuda::mutex);
  return fake_cuda::pinned[data] = nbytes, cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void* data) {
  const std::lock_guard<std::mutex> lock(fake_cuda::mutex);
  return fake_cuda::pinned.erase(data), cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  return *device = host, cudaSuccess;
}
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return *pool = new CUpool_st(), cudaSuccess;
}
inline cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { return delete pool, cudaSuccess; }
inline cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
inline cudaError_t cudaMallocFromPoolAsync(void** data, size_t nbytes, cudaMemPool_t,
                                           cudaStream_t) {
  return cudaMalloc(data, nbytes);
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) { return cudaFree(data); }
inline cudaError_t cudaMemAdvise(void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return cudaSuccess;
}
inline cudaError_t cudaMemPrefetchAsync(void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const int64_t left =
      fake_cuda::kDeviceBytes - fake_cuda::device_bytes - fake_cuda::taken_by_others;
  const bool is_full = fake_cuda::full_at_question > 0 && fake_cuda::full_at_question-- == 1;
  *free = static_cast<size_t>(left > 0 && !is_full ? left : 0);
  return *total = fake_cuda::kDeviceBytes, cudaSuccess;
}
inline cudaError_t cudaMemset(void* data, int value, size_t nbytes) {
  return std::memset(data, value, nbytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t nbytes, cudaMemcpyKind) {
  return fake_cuda::Copy(to, from, nbytes);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind,
                                   cudaStream_t) {
  return cudaMemcpy(to, from, nbytes, kind);
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = new CUstream_st(), cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream == nullptr ? cudaDeviceSynchronize() : cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new CUevent_st(), cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return *ms = 1.0f, cudaSuccess;
}
