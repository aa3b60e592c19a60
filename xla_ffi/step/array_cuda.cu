// See array_cuda.h. One warp loads or stores a block.
#include <algorithm>
#include <type_traits>

#include "base/cuda_check.h"
#include "base/fast_math.h"
#include "step/array.h"
#include "step/array_cuda.h"
#include "step/launch_cuda.h"
#include "step/token_cuda.h"

namespace paged_optax {
namespace {

// Of a launch, to which they travel by value.
constexpr int kMostArrays = 50;

struct Batch {
  CudaArray arrays[kMostArrays];
  int num_arrays;
  int64_t num_blocks;
};

// A step that was refused when it began has the token of before, and was reported then.
__device__ void ReportLost(const CudaArrayCall& call, Token token, Verdict verdict,
                           const Header* header) {
  if (token.version < 0) ReportRejection(call.reports, token, verdict, header, /*fingerprint=*/0);
}

template <class Format>
struct ArrayShared {
  typename Format::template Tables<uint8_t> tables;
  Header* header;
  uint8_t* const* source;  // bases of the segments; nullptr for zeros
  uint8_t* const* target;  // nullptr if the step is not open
  int32_t log2_chunks;
};

template <class Format>
__device__ void Prepare(const CudaArrayCall& call, ArrayShared<Format>& shared) {
  FillTables<Format>(shared.tables);
  const Token token = *call.token;
  if (threadIdx.x < kWarpSize) {
    Header* const header = FindHeader(call.headers, call.num_headers, token);
    const int slot = FindOpenSlot(header, token);
    if (threadIdx.x == 0) {
      shared.header = header;
      shared.source = shared.target = nullptr;
      if (slot >= 0) {
        const int source = FindOpenSource(*header, slot);
        shared.target = header->segments->bases[slot];
        if (source >= 0) shared.source = header->segments->bases[source];
        shared.log2_chunks = header->segments->log2_chunks;
      }
      if (blockIdx.x == 0) {
        *call.new_token = slot < 0 ? LostToken(token) : token;
        if (slot < 0) {
          ReportLost(call, token, header ? Verdict::kStale : Verdict::kUnknown, header);
        }
      }
    }
  }
  __syncthreads();
}

// Where a block of the array lies, or nothing: a program that cuts the leaf over the devices in
// another way than when the step began gets zeros and cannot end it.
__device__ const ArrayPlace* FindPlace(const CudaArrayCall& call, Header* header,
                                       const CudaArray& array) {
  if (array.leaf >= 0 && array.leaf < header->num_places) {
    const ArrayPlace& place = header->places[array.leaf];
    if (place.stamp == array.stamp && place.format == array.format) return &place;
  }
  const Token token = *call.token;
  const int slot = FindOpenSlot(header, token);
  if (slot >= 0) header->versions[slot] = 0;
  ReportLost(call, token, Verdict::kOtherLayout, header);
  return nullptr;
}

// One of two vectors of another thread of the warp.
__device__ inline uint4 TakeVector(const uint4 (&vectors)[2], int which, int thread) {
  constexpr uint32_t kAll = 0xffffffffu;
  const auto take = [&](uint32_t first, uint32_t second) {
    const uint32_t one = __shfl_sync(kAll, first, thread);
    const uint32_t other = __shfl_sync(kAll, second, thread);
    return which == 0 ? one : other;
  };
  return {take(vectors[0].x, vectors[1].x), take(vectors[0].y, vectors[1].y),
          take(vectors[0].z, vectors[1].z), take(vectors[0].w, vectors[1].w)};
}

// The 1,024 bytes of a block of floats, of which a thread has 32 in a row. With each instruction a
// warp reads or writes 512 bytes in a row, which matters where they are in host memory.
__device__ inline void LoadCodesTogether(const uint8_t* source, int thread, float (&codes)[kLane]) {
  const uint4 vectors[] = {LoadVector(source + 16 * thread),
                           LoadVector(source + 512 + 16 * thread)};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    UnpackFloats(TakeVector(vectors, thread / 16, (2 * thread + k) % kWarpSize), 4 * k, codes);
  }
}

__device__ inline void StoreCodesTogether(const float (&codes)[kLane], int thread,
                                          uint8_t* target) {
  const uint4 vectors[] = {PackFloats(codes, 0), PackFloats(codes, 4)};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    StoreVector(TakeVector(vectors, thread % 2, thread / 2 + 16 * k),
                target + 512 * k + 16 * thread);
  }
}

template <class Format>
__device__ void LoadCodesOf(const uint8_t* codes, const uint8_t* words, int thread,
                            Lane<Values, Format, kLane>& lane) {
  if constexpr (std::is_same_v<Format, Float32>) {
    LoadCodesTogether(codes, thread, lane.codes[0]);
  } else {
    LoadLaneCodes<Format>(codes + thread * kLaneBytes<Format>, thread, lane.codes[0]);
  }
  if constexpr (kNumWords<Values, Format> > 0) {
    lane.words[0] = *reinterpret_cast<const uint32_t*>(words);
  }
}

template <class Format>
__device__ void LoadBlock(const ArrayShared<Format>& shared, const CudaArray& array,
                          const ArrayPlace* place, int64_t block, int thread) {
  const int64_t start = block * kBlockSize + thread * kLane, left = array.size - start;
  const int count = left < 0 ? 0 : (left < kLane ? static_cast<int>(left) : kLane);
  alignas(16) float values[kLane] = {};
  if (place != nullptr && shared.source != nullptr) {
    const int64_t at = place->first_block + block;
    const BlockPlace bytes = place->region.Locate(at);
    const uint8_t* base = shared.source[place->region.Chunk(at) >> shared.log2_chunks];
    Lane<Values, Format, kLane> lane;
    LoadCodesOf(base + bytes.codes, base + bytes.words, thread, lane);
    DecodeArray<Format>(shared.tables, lane, values);
  }
  Store(array.data, array.dtype, start, count, values);
}

template <class Format>
__device__ void StoreBlock(const ArrayShared<Format>& shared, const CudaArray& array,
                           const ArrayPlace& place, int64_t block, int thread, uint32_t phase) {
  const int64_t start = block * kBlockSize + thread * kLane, left = array.size - start;
  const int count = left < 0 ? 0 : (left < kLane ? static_cast<int>(left) : kLane);
  alignas(16) float values[kLane];
  Load(array.data, array.dtype, start, count, values);
  Lane<Values, Format, kLane> lane;
  EncodeArray<Format>(FastMath(), shared.tables, DitherStart(array.key, start) + phase, values,
                      lane, Warp());
  const int64_t at = place.first_block + block;
  const BlockPlace bytes = place.region.Locate(at);
  uint8_t* base = shared.target[place.region.Chunk(at) >> shared.log2_chunks];
  uint8_t* const codes = base + bytes.codes;
  if constexpr (std::is_same_v<Format, Float32>) {
    StoreCodesTogether(lane.codes[0], thread, codes);
  } else {
    StoreLaneCodes<Format>(lane.codes[0], thread, codes + thread * kLaneBytes<Format>);
  }
  if constexpr (kNumWords<Values, Format> > 0) {
    if (thread == 0) *reinterpret_cast<uint32_t*>(base + bytes.words) = lane.words[0];
  }
}

template <class Format, bool kStores>
__global__ void __launch_bounds__(kThreads)
    ArrayKernel(const __grid_constant__ CudaArrayCall call, const __grid_constant__ Batch batch) {
  __shared__ ArrayShared<Format> shared;
  Prepare(call, shared);
  if (kStores && shared.target == nullptr) return;
  const uint32_t phase = kStores ? DitherPhase(*call.count) : 0;
  const int thread = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t block = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
       block < batch.num_blocks; block += stride) {
    const CudaArray& array =
        batch.arrays[FindLast(batch.arrays, batch.num_arrays, &CudaArray::begin, block)];
    const ArrayPlace* place =
        shared.target == nullptr ? nullptr : FindPlace(call, shared.header, array);
    if constexpr (kStores) {
      if (place != nullptr) {
        StoreBlock(shared, array, *place, block - array.begin, thread, phase);
      }
    } else {
      LoadBlock(shared, array, place, block - array.begin, thread);
    }
  }
}

__global__ void CloseKernel(const __grid_constant__ CudaArrayCall call) {
  const Token token = *call.token;
  Header* const header = FindHeader(call.headers, call.num_headers, token);
  if (threadIdx.x != 0) return;
  const int slot = FindOpenSlot(header, token);
  *call.new_token = slot < 0 ? LostToken(token) : Close(header, slot);
  if (slot < 0) ReportLost(call, token, header ? Verdict::kStale : Verdict::kUnknown, header);
}

using Kernel = void (*)(CudaArrayCall, Batch);

Kernel FindKernel(int format, bool stores) {
  Kernel found = nullptr;
  Visit(Formats(), format, [&](auto chosen) {
    using Format = typename decltype(chosen)::type;
    found = stores ? ArrayKernel<Format, true> : ArrayKernel<Format, false>;
  });
  return found;
}

void LaunchBatch(const CudaArrayCall& call, const Batch& batch, int format, int device,
                 Stream stream) {
  const Kernel kernel = FindKernel(format, call.count != nullptr);
  // At least one, which passes the token on.
  const auto blocks = static_cast<unsigned>(
      std::max<int64_t>(1, NumThreadBlocks(kernel, batch.num_blocks, device)));
  CUDA_LAUNCH(kernel<<<blocks, kThreads, 0, stream>>>(call, batch));
}

}  // namespace

void PrepareArrays(const std::vector<int>& formats, int device) {
  ScopedDevice scope(device);
  for (const int format : formats) {
    for (const bool stores : {false, true}) NumThreadBlocks(FindKernel(format, stores), 1, device);
  }
  cudaFuncAttributes attributes;
  CUDA_CHECK(cudaFuncGetAttributes(&attributes, CloseKernel));
}

void LaunchArrays(const CudaArrayCall& call, std::vector<CudaArray> arrays, int device,
                  Stream stream) {
  ScopedDevice scope(device);
  std::stable_sort(arrays.begin(), arrays.end(), [](const CudaArray& one, const CudaArray& other) {
    return one.format < other.format;
  });
  Batch batch{};
  for (size_t i = 0; i < arrays.size(); ++i) {
    arrays[i].begin = batch.num_blocks;
    batch.arrays[batch.num_arrays++] = arrays[i];
    batch.num_blocks += NumBlocks(arrays[i].size);
    const bool is_last = i + 1 == arrays.size();
    if (!is_last && batch.num_arrays < kMostArrays && arrays[i + 1].format == arrays[i].format) {
      continue;
    }
    LaunchBatch(call, batch, arrays[i].format, device, stream);
    batch = Batch{};
  }
}

void LaunchClose(const CudaArrayCall& call, int device, Stream stream) {
  ScopedDevice scope(device);
  CUDA_LAUNCH(CloseKernel<<<1, kWarpSize, 0, stream>>>(call));
}

}  // namespace paged_optax
