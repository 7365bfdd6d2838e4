// Python module _native_cpu. Tensors are passed as addresses and integers, checked by the caller; kernels run without
// the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "deco/flow_matching_loss.h"
#include "deco/isa.h"
#include "deco/pixel_decoder.h"
#include "deco/pixel_decoder_from_tokens.h"
#include "deco/pixel_decoder_loss.h"
#include "deco/upsample_modulate.h"
#include "descriptions.h"

namespace py = pybind11;

namespace {

// Defines function `name` of the module: reads a call, releases the GIL, runs the kernel.
template <class Call>
void bind(py::module_& m, const std::string& name, void (*kernel)(const Call&)) {
  const std::string arguments = deco::python::argument_names<Call>().text;
  m.def(
      name.c_str(),
      [name, kernel](const py::args& arguments) {
        Call call;
        deco::python::read_arguments(name, arguments, call);
        py::gil_scoped_release release;
        kernel(call);
      },
      ("Arguments: " + arguments + ". Writes the results; gradients with address 0 are not computed").c_str());
}

// Runs a loss with a workspace of zeros.
template <class Call, void (*kernel)(const Call&)>
void with_workspace(const Call& given) {
  Call call = given;
  std::vector<double> workspace(
      static_cast<size_t>(deco::cpu::loss_workspace_size(call.inputs.batch, call.inputs.threads)));
  call.inputs.workspace = workspace.data();
  kernel(call);
}

}  // namespace

PYBIND11_MODULE(_native_cpu, m) {
  using namespace deco::cpu;
  m.doc() = "CPU kernels of deco_kernels";
  m.def("usable_isas", &usable_isas, "Instruction sets of this build that this processor supports, fastest first");
  m.def("current_isa", &current_isa, "The current instruction set");
  m.def("select_isa", &select_isa, py::arg("name"),
        "Select the instruction set of all later calls; ValueError if it is unknown or not usable here");
  m.def("vector_lanes", &vector_lanes, "Floats per vector of the current instruction set");
  m.def("has_amx_bf16", &has_amx_bf16, "Whether this process may use matrix instructions for bfloat16 (AMX)");

  bind(m, "adaln_block_forward", &adaln_block_forward);
  bind(m, "adaln_block_backward", &adaln_block_backward);
  bind(m, "pixel_decoder_forward", &pixel_decoder_forward);
  bind(m, "pixel_decoder_backward", &pixel_decoder_backward);
  bind(m, "pixel_decoder_from_tokens_forward", &pixel_decoder_from_tokens_forward);
  bind(m, "pixel_decoder_loss", &pixel_decoder_loss);
  bind(m, "upsample_forward", &upsample_forward);
  bind(m, "upsample_backward", &upsample_backward);
  bind(m, "upsample_modulate_forward", &upsample_modulate_forward);
  bind(m, "modulate_forward", &modulate_forward);
  bind(m, "modulate_backward", &modulate_backward);
  bind(m, "flow_matching_loss_forward", &with_workspace<FlowMatchingLossForward, flow_matching_loss_forward>);
  bind(m, "flow_matching_loss_backward", &with_workspace<FlowMatchingLossBackward, flow_matching_loss_backward>);
}
