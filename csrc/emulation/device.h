// Limits of the emulated device, set by tests.
#pragma once

#include "deco/cuda/call.h"

namespace deco::emulation {

void set_device_limits(const cuda::DeviceLimits& limits);

}  // namespace deco::emulation
