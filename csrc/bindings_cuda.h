// Functions of the Python modules _native_cuda and _native_cuda_emulated.
#pragma once

#include <pybind11/pybind11.h>

namespace deco::python {

void bind_cuda(pybind11::module_& m);

}  // namespace deco::python
