// Descriptions of memory that callers pass to the kernels, which neither own it nor keep references to it. `fields`
// visits the fields of a struct by name and in order; csrc/descriptions.h fills them.
#pragma once

#include <cstdint>

namespace deco {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A dense row-major array; data may be null where documented as optional.
struct Array {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("array", data, dtype);
  }
};

// [B, C, H, W] with any strides, in elements.
struct ImageArray {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_b = 0, stride_c = 0, stride_y = 0, stride_x = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("image", data, dtype, stride_b, stride_c, stride_y, stride_x);
  }
};

// [rows, channels] with unit channel stride; the row stride is in elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("rows", data, dtype, stride);
  }
};

// [tokens, pixels per token, channels] with unit channel stride; the other two strides are in elements.
struct PixelRows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0, pixel_stride = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("pixel rows", data, dtype, token_stride, pixel_stride);
  }
};

namespace cpu {

// A call on the CPU: an op with the number of threads.
template <class Op>
struct Threaded : Op {
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    Op::fields(visit);
    visit("threads", threads);
  }
};

}  // namespace cpu
}  // namespace deco
