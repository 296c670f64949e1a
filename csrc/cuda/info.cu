// Build and run-time facts of the CUDA part. Host code only: no context is created and no device memory is touched.
#include <cuda_runtime_api.h>

#include "cuda_info.h"

namespace pyunictokens {

CudaInfo cuda_info() {
  CudaInfo info;
  info.architectures = PYUNICTOKENS_CUDA_ARCHITECTURES;
  info.runtime_version = CUDART_VERSION;
  if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) info.driver_version = 0;
  const cudaError_t status = cudaGetDeviceCount(&info.device_count);
  if (status != cudaSuccess) {
    info.device_count = 0;
    info.error = cudaGetErrorString(status);
    cudaGetLastError();  // this failure is answered here; nobody later should meet it
  }
  return info;
}

}  // namespace pyunictokens
