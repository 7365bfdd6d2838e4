// The functions of the Python module _native_cuda, for it and for its emulated twin.
#pragma once

#include <pybind11/pybind11.h>

namespace deco::python {

void bind_cuda(pybind11::module_& m);

}  // namespace deco::python
