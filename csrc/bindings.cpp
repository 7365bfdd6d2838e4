// Python module _native_cpu: the only file that knows Python. Tensors come as addresses and plain integers, already
// checked by the caller; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "deco/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_native_cpu, m) {
  m.doc() = "CPU kernels of deco_kernels";
  m.def("usable_isas", &deco::cpu::usable_isas, "Instruction sets of this build that this processor runs, fastest first");
  m.def("current_isa", &deco::cpu::current_isa, "The instruction set in use");
  m.def("select_isa", &deco::cpu::select_isa, py::arg("name"),
        "Run every later call on this instruction set; ValueError if it is unknown or cannot run here");
  m.def("vector_lanes", &deco::cpu::vector_lanes, "Floats per vector of the instruction set in use");
}
