// The CUDA side of maskgit_step.h: one launch for a batch, fit for capture (nothing is allocated, copied or waited for).
#pragma once

#include <string>

#include "maskgit_step.h"
#include "philox.h"

namespace pyunictokens {

struct MaskgitStepCudaArgs {
  MaskgitStepArgs step;                                                          // every pointer in device memory
  std::int64_t mask_len_stride, temperature_stride, sample_stride, step_stride;  // 0: one number for all samples
  std::uint32_t* keys;                                                           // [B, N] scratch, any content
  std::uint32_t* done;                                                           // [B] zeros; zeros again afterwards
  PhiloxKeys rounds;                                                             // philox_keys(step.seed)
};

// Enqueues on `stream` (a cudaStream_t) of device `device`. Returns the runtime's words if the launch failed, else "".
std::string maskgit_step_cuda(const MaskgitStepCudaArgs& args, int device, void* stream);

// The kernel's code run by the host, a block of `threads` emulated one after the other, with or without the row kept in
// shared memory. For tests on machines without a GPU.
void maskgit_step_emulated(const MaskgitStepCudaArgs& args, int threads, bool cached);

}  // namespace pyunictokens
