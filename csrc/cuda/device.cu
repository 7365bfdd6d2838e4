// Device queries through the CUDA runtime; csrc/emulation/device.cpp replaces this file on the host.
#include "cuda/launch.h"

namespace deco::cuda {

const char* describe(int code) {
  if (code == kWorkspaceTooSmall) return "the workspace is smaller than the size that the workspace query returns";
  if (code == kTooManyPixels) return "2^31 or more pixels in one call; split the batch";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

Status select_device(int device, int& previous) {
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  return status_of(error, "selecting the device");
}

Status device_limits(int device, DeviceLimits& limits) {
  cudaError_t error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return status_of(error, "reading the device's limits");
}

}  // namespace deco::cuda
