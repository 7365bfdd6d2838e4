// Reads the descriptions of tensors that Python hands to the native modules: tuples of addresses, dtypes and strides.
#pragma once

#include <pybind11/pybind11.h>

#include "deco/pixel_decoder.h"

namespace deco::python {

namespace py = pybind11;

// Reads a tuple of integers from left to right.
class Integers {
 public:
  explicit Integers(const py::tuple& tuple) : tuple_(tuple.ptr()) {}

  int64_t next() {
    if (index_ >= PyTuple_GET_SIZE(tuple_)) throw py::value_error("too few integers in a description");
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_, index_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  void* next_address() { return reinterpret_cast<void*>(next()); }
  DType next_dtype() { return static_cast<DType>(next()); }

 private:
  PyObject* tuple_;
  Py_ssize_t index_ = 0;
};

inline Array read_array(Integers& in) {
  Array array;
  array.data = in.next_address();
  array.dtype = in.next_dtype();
  return array;
}

inline ImageArray read_image(const py::tuple& description) {
  Integers in(description);
  ImageArray image;
  image.data = in.next_address();
  image.dtype = in.next_dtype();
  image.stride_b = in.next();
  image.stride_c = in.next();
  image.stride_y = in.next();
  image.stride_x = in.next();
  return image;
}

inline PixelRows read_pixel_rows(const py::tuple& description) {
  Integers in(description);
  PixelRows rows;
  rows.data = in.next_address();
  rows.dtype = in.next_dtype();
  rows.token_stride = in.next();
  rows.pixel_stride = in.next();
  return rows;
}

inline Rows read_rows(const py::tuple& description) {
  Integers in(description);
  Rows rows;
  rows.data = in.next_address();
  rows.dtype = in.next_dtype();
  rows.stride = in.next();
  return rows;
}

inline BlockWeightArrays read_block_weights(Integers& in) {
  BlockWeightArrays w;
  for (Array* array : {&w.norm_weight, &w.norm_bias, &w.mod_weight, &w.mod_bias, &w.fc1_weight, &w.fc1_bias,
                       &w.fc2_weight, &w.fc2_bias})
    *array = read_array(in);
  return w;
}

// The four arrays of a modulation; the rest stays null.
inline BlockWeightArrays read_modulation(const py::tuple& description) {
  Integers in(description);
  BlockWeightArrays w;
  for (Array* array : {&w.norm_weight, &w.norm_bias, &w.mod_weight, &w.mod_bias}) *array = read_array(in);
  return w;
}

inline DecoderShape read_decoder_shape(const py::tuple& description) {
  Integers in(description);
  DecoderShape shape;
  shape.batch = in.next();
  shape.channels = static_cast<int>(in.next());
  shape.height = in.next();
  shape.width = in.next();
  shape.patch_size = static_cast<int>(in.next());
  shape.decoder_width = static_cast<int>(in.next());
  shape.depth = static_cast<int>(in.next());
  return shape;
}

inline DecoderWeightArrays read_decoder_weights(const py::tuple& description) {
  Integers in(description);
  DecoderWeightArrays w;
  w.pixel_weight = read_array(in);
  w.pixel_table = read_array(in);
  w.blocks = read_block_weights(in);
  w.head_weight = read_array(in);
  w.head_bias = read_array(in);
  return w;
}

}  // namespace deco::python
