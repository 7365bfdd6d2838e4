// Device queries of the emulated device, in place of cuda/device.cu.
#include "deco/cuda/call.h"
#include "emulation/machine.h"

namespace deco::cuda {

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
  limits = emulation::Machine::instance().limits();
  return {};
}

}  // namespace deco::cuda
