// What the CUDA part of this build is and what it finds on the machine. Answers without a GPU and without a driver.
#pragma once

#include <string>

namespace pyunictokens {

struct CudaInfo {
  std::string architectures;  // machine code and PTX in this build, e.g. "80-real 90a-real 100-real 100-virtual"
  int runtime_version = 0;    // CUDART_VERSION of the static runtime, e.g. 13000
  int driver_version = 0;     // newest CUDA the installed driver can serve; 0: no driver
  int device_count = 0;       // 0: none, or none that can be used
  std::string error;          // why device_count is 0, in the runtime's words; empty if it is not
};

CudaInfo cuda_info();

}  // namespace pyunictokens
