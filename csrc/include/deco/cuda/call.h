// What every launcher of the CUDA kernels takes and returns. A launcher enqueues kernels on a stream of the current
// device and returns; it allocates nothing and waits for nothing, so CUDA graphs can capture it.
#pragma once

#include <cstdint>

namespace deco::cuda {

// What chooses between the variants of a kernel and sizes its grid.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // the most one thread block may use
};

struct Call {
  DeviceLimits limits;
  void* stream = nullptr;  // a cudaStream_t
  // Scratch memory, at least as large as the op's workspace query says and aligned to 256 bytes. What it holds is
  // meaningless before and after.
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

// What a code means, in words.
const char* describe(int code);

// Makes `device` current for this thread and says which one was.
Status select_device(int device, int& previous);
// The limits of a device.
Status device_limits(int device, DeviceLimits& limits);
// Whether this build holds code for the current device.
Status check_kernels();

}  // namespace deco::cuda
