// Python module _native_cuda_emulated: the functions of _native_cuda, emulated on the host.
#include "bindings_cuda.h"
#include "emulation/device.h"
#include "emulation/machine.h"

namespace py = pybind11;

namespace {

py::list launches_of(const py::function& call) {
  auto& machine = deco::emulation::Machine::instance();
  std::vector<deco::emulation::NamedLaunch> launches;
  machine.list_launches(&launches);
  try {
    call();
  } catch (...) {
    machine.list_launches(nullptr);
    throw;
  }
  machine.list_launches(nullptr);
  py::list result;
  for (const auto& [name, size] : launches)
    result.append(py::make_tuple(name, size.blocks, size.threads, size.shared_bytes));
  return result;
}

}  // namespace

PYBIND11_MODULE(_native_cuda_emulated, m) {
  m.doc() = "CUDA kernels of deco_kernels, emulated on the host for tests";
  py::register_exception<deco::emulation::Fault>(m, "Fault", PyExc_RuntimeError);
  deco::python::bind_cuda(m);
  m.def(
      "set_seed", [](uint32_t seed) { deco::emulation::Machine::instance().set_seed(seed); }, py::arg("seed"),
      "Seeds the order in which warps run");
  m.def("launches_of", &launches_of, py::arg("call"),
        "Launches [(name, thread blocks, threads, bytes of shared memory)] of call(), without running them");
  m.def(
      "set_device_limits",
      [](int multiprocessors, int shared_bytes) {
        deco::emulation::set_device_limits({multiprocessors, shared_bytes});
      },
      py::arg("multiprocessors"), py::arg("shared_bytes"), "Sets the limits of the emulated device");
}
