// The emulated device: limits that tests choose.
#pragma once

#include "deco/cuda/call.h"

namespace deco::emulation {

void set_device_limits(const cuda::DeviceLimits& limits);

}  // namespace deco::emulation
