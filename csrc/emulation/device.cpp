#include "emulation/device.h"

namespace deco {

namespace {
cuda::DeviceLimits emulated_limits{2, 227 << 10};
}

void emulation::set_device_limits(const cuda::DeviceLimits& limits) { emulated_limits = limits; }

namespace cuda {

const char* describe(int code) {
  if (code == kWorkspaceTooSmall) return "the workspace is smaller than the size that the workspace query returns";
  if (code == kTooManyPixels) return "2^31 or more pixels in one call; split the batch";
  return "no CUDA error occurs in emulation";
}
Status select_device(int device, int& previous) {
  previous = device;
  return {};
}
Status device_limits(int, DeviceLimits& limits) {
  limits = emulated_limits;
  return {};
}

}  // namespace cuda
}  // namespace deco
