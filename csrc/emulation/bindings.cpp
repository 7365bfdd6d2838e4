// Python module _native_cuda_emulated: the functions of _native_cuda, emulated on the host.
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "emulation/machine.h"

namespace py = pybind11;
using deco::emulation::Machine;

namespace {

py::list launches_of(const py::function& call) {
  std::vector<deco::emulation::NamedLaunch> launches;
  Machine::instance().list_launches(&launches);
  try {
    call();
  } catch (...) {
    Machine::instance().list_launches(nullptr);
    throw;
  }
  Machine::instance().list_launches(nullptr);
  py::list result;
  for (const auto& [name, size] : launches)
    result.append(py::make_tuple(name, size.blocks, size.threads, size.shared_bytes));
  return result;
}

py::tuple as_tuple(const deco::emulation::Traffic& t) { return py::make_tuple(t.requested, t.sectors, t.distinct); }

py::list record_accesses(const py::function& call) {
  Machine::instance().start_recording();
  try {
    call();
  } catch (...) {
    Machine::instance().stop_recording();
    throw;
  }
  py::list result;
  for (const auto& launch : Machine::instance().stop_recording()) {
    py::list buffers;
    for (const auto& b : launch.buffers)
      buffers.append(py::make_tuple(b.address, b.bytes, as_tuple(b.read), as_tuple(b.written)));
    const auto& shared = launch.shared;
    result.append(py::make_tuple(launch.name, launch.blocks, launch.threads, launch.shared_bytes, buffers,
                                 py::make_tuple(shared.accesses, shared.wavefronts, shared.conflicts)));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_native_cuda_emulated, m) {
  m.doc() = "CUDA kernels of deco_kernels, emulated on the host for tests";
  py::register_exception<deco::emulation::Fault>(m, "Fault", PyExc_RuntimeError);
  deco::python::bind_cuda(m);
  m.def(
      "set_seed", [](uint32_t seed) { Machine::instance().set_seed(seed); }, py::arg("seed"),
      "Seeds the order in which warps and lanes run");
  m.def(
      "check_races", [](bool on) { Machine::instance().check_races(on); }, py::arg("on"),
      "Raises Fault for accesses of shared memory that no barrier orders, from now on or no longer");
  m.def(
      "set_truncating", [](bool on) { Machine::instance().set_truncating(on); }, py::arg("on"),
      "Cuts products' sums and tanh toward zero instead of rounding them to nearest");
  m.def("launches_of", &launches_of, py::arg("call"),
        "Launches [(name, thread blocks, threads, bytes of shared memory)] of call(), without running them");
  m.def("record_accesses", &record_accesses, py::arg("call"),
        "Accesses of the launches of call(); deco_kernels.testing.emulation.record_accesses names them");
  m.def(
      "set_device_limits",
      [](int multiprocessors, int shared_bytes) { Machine::instance().set_limits({multiprocessors, shared_bytes}); },
      py::arg("multiprocessors"), py::arg("shared_bytes"), "Sets the limits of the emulated device");
}
