// Product of a tensor and one number on CUDA devices.
#pragma once

#include "deco/cuda/call.h"

namespace deco::cuda {

// product = factor·values in float32, rounded to bfloat16. values and product: contiguous, bfloat16, aligned to 16 bytes.
struct ScaledProduct {
  int64_t count = 0;  // numbers in values
  const void* values = nullptr;
  const float* factor = nullptr;
  void* product = nullptr;  // written

  template <class Visit>
  void fields(Visit&& visit) {
    visit("count", count);
    visit("values", values);
    visit("factor", factor);
    visit("product", product);
  }
};

Status scaled_product(const Call& call, const ScaledProduct& op);

}  // namespace deco::cuda
