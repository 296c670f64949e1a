// maskgit_step on a GPU in one launch: a block per row, which reads its logits from memory once and keeps them in shared
// memory; the last block of a sample to finish selects what is masked again. The algorithm is in maskgit_team.h.
#include <cuda_runtime.h>

#include "maskgit_step_cuda.h"
#include "maskgit_team.h"

namespace pyunictokens {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct BlockTeam {
  unsigned long long* tops;  // [kWarps] each, in shared memory, used once
  float* sums;

  __device__ __forceinline__ std::uint32_t size() const { return kThreads; }

  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
    f(std::uint32_t(threadIdx.x));
    __syncthreads();
  }

  template <typename F>
  __device__ __forceinline__ void one(F&& f) const {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

  template <typename F>
  __device__ __forceinline__ unsigned long long max(F&& f) const {
    unsigned long long value = f(std::uint32_t(threadIdx.x));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const unsigned long long other = __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
      value = value < other ? other : value;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = value;
    __syncthreads();
    value = tops[threadIdx.x % kWarps];
#pragma unroll
    for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) {
      const unsigned long long other = __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
      value = value < other ? other : value;
    }
    return value;
  }

  // In one order whatever happens: the same bits at every run.
  template <typename F>
  __device__ __forceinline__ float sum(F&& f) const {
    float value = f(std::uint32_t(threadIdx.x));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = sums[threadIdx.x % kWarps];
#pragma unroll
    for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
    return value;
  }

  static __device__ __forceinline__ void raise(unsigned long long* to, unsigned long long value) {
    atomicMax(to, value);
  }
  static __device__ __forceinline__ std::uint32_t add(std::uint32_t* to, std::uint32_t value) {
    return atomicAdd(to, value);
  }
  static __device__ __forceinline__ unsigned long long peek(const unsigned long long* from) {
    return *static_cast<const volatile unsigned long long*>(from);
  }
  // What other blocks of this launch wrote: never from this multiprocessor's own cache.
  template <typename T>
  static __device__ __forceinline__ T fresh(const T* from) {
    return __ldcg(from);
  }
  static __device__ __forceinline__ std::int64_t fresh(const std::int64_t* from) {
    return std::int64_t(__ldcg(reinterpret_cast<const long long*>(from)));
  }
};

// Four blocks of rows kept in shared memory fill a multiprocessor's; rows that are too long for it take more registers.
template <typename T, bool cached>
__global__ void __launch_bounds__(kThreads, cached ? 4 : 3) step_kernel(const MaskgitStepCudaArgs args) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ team::Shared shared;
  __shared__ unsigned long long tops[kWarps];
  __shared__ float sums[kWarps];
  const BlockTeam block{tops, sums};
  const std::uint32_t positions = std::uint32_t(args.step.positions);
  const std::uint32_t b = blockIdx.x / positions, n = blockIdx.x - b * positions;
  team::row<BlockTeam, T, cached>(block, args, b, n, reinterpret_cast<team::Pack<T>*>(dynamic), shared);
  if (threadIdx.x == 0) {
    __threadfence();  // this row's results, before its tick
    shared.last = atomicAdd(args.done + b, 1u) == positions - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.last) return;
  team::select(block, args, b, shared);
  if (threadIdx.x == 0) args.done[b] = 0;
}

template <typename T>
cudaError_t launch(const MaskgitStepCudaArgs& args, int device, cudaStream_t stream) {
  const std::int64_t bytes = team::packs_of<T>(args.step.entries) * 16;
  const std::int64_t blocks = args.step.batch * args.step.positions;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  int room = 0;
  cudaError_t status = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  if (bytes + std::int64_t(sizeof(team::Shared)) + 1024 > room) {
    step_kernel<T, false><<<unsigned(blocks), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  if (bytes > 40 * 1024) {  // with the static part beyond what needs no permission
    status = cudaFuncSetAttribute(step_kernel<T, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (status != cudaSuccess) return status;
  }
  step_kernel<T, true><<<unsigned(blocks), kThreads, std::size_t(bytes), stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_on(const MaskgitStepCudaArgs& args, int device, cudaStream_t stream) {
  switch (args.step.type) {
    case FloatType::kFloat32: return launch<float>(args, device, stream);
    case FloatType::kBFloat16: return launch<BFloat16>(args, device, stream);
    default: return launch<Float16>(args, device, stream);
  }
}

}  // namespace

std::string maskgit_step_cuda(const MaskgitStepCudaArgs& args, int device, void* stream) {
  int before = device;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
  if (status == cudaSuccess) status = launch_on(args, device, static_cast<cudaStream_t>(stream));
  if (before != device) {
    const cudaError_t restored = cudaSetDevice(before);
    if (status == cudaSuccess) status = restored;
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // this failure is answered here; nobody later should meet it
  return cudaGetErrorString(status);
}

}  // namespace pyunictokens
