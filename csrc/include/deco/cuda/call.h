// Common argument and result of the launchers of the CUDA kernels. A launcher enqueues kernels on a stream of the
// current device and returns. It does not allocate or synchronize, so CUDA graphs can capture it.
#pragma once

#include <cstdint>

namespace deco::cuda {

// Device properties that select the variant of a kernel and the size of its grid.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // maximum per thread block
};

struct Call {
  DeviceLimits limits;
  void* stream = nullptr;  // a cudaStream_t
  // Scratch memory, aligned to 256 bytes and at least as large as the size that the op's workspace query returns. Its
  // contents are undefined before and after the call.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// 0, a cudaError_t, or one of the codes below; `stage` names the kernel or query that failed.
struct Status {
  int code = 0;
  const char* stage = "";

  bool ok() const { return code == 0; }
};
constexpr int kWorkspaceTooSmall = -1;
constexpr int kTooManyPixels = -2;  // 2^31 or more in one call

// Message of a status code.
const char* describe(int code);

// Makes `device` current for this thread; `previous` receives the device that was current.
Status select_device(int device, int& previous);
// Queries the limits of a device.
Status device_limits(int device, DeviceLimits& limits);
// Ok if this build contains code for the current device.
Status check_kernels();

}  // namespace deco::cuda
