// Python module _native_cuda. Tensors are passed as addresses and integers, checked by the caller. A context is
// (device, stream, workspace address, workspace bytes). Functions enqueue kernels without the GIL and return; a failure
// raises RuntimeError with the op, its sizes and CUDA's message, 2^31 or more pixels ValueError.
#include "bindings_cuda.h"

#include <string>

#include "deco/cuda/adaln_block.h"
#include "deco/cuda/flow_matching_loss.h"
#include "deco/cuda/pixel_decoder.h"
#include "deco/cuda/pixel_decoder_loss.h"
#include "deco/cuda/scaled_product.h"
#include "deco/cuda/upsample_modulate.h"
#include "descriptions.h"

namespace deco::python {

namespace {

// Makes a device current and restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device), status_(cuda::select_device(device, previous_)) {}
  ~DeviceGuard() {
    int ignored;
    if (status_.ok() && previous_ != device_) cuda::select_device(previous_, ignored);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cuda::Status status() const { return status_; }

 private:
  int device_, previous_ = 0;
  cuda::Status status_;
};

std::string describe(const cuda::Status& status) {
  return std::string(status.stage) + ": " + cuda::describe(status.code) + " (code " + std::to_string(status.code) + ")";
}

std::string sizes_of(const DecoderShape& s) {
  return "image [" + std::to_string(s.batch) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.height) +
         ", " + std::to_string(s.width) + "], patch_size " + std::to_string(s.patch_size) + ", D " +
         std::to_string(s.decoder_width) + ", N " + std::to_string(s.depth);
}

std::string sizes_of(const cuda::FlowMatchingLossInputs& inputs) {
  return "pred [" + std::to_string(inputs.batch) + ", 3, " + std::to_string(inputs.height) + ", " +
         std::to_string(inputs.width) + "]";
}

std::string sizes_of(const cuda::ScaledProduct& op) { return "[" + std::to_string(op.count) + "]"; }

// The sizes of a call, for errors.
template <class Op>
auto sizes_of(const Op& op) -> decltype(sizes_of(op.shape)) {
  return sizes_of(op.shape);
}
template <class Op>
auto sizes_of(const Op& op) -> decltype(sizes_of(op.inputs)) {
  return sizes_of(op.inputs);
}
template <class Op>
auto sizes_of(const Op& op) -> decltype(std::to_string(op.rows)) {
  return "[" + std::to_string(op.rows) + ", " + std::to_string(op.width) + "]";
}

// Device, stream and workspace of a call.
struct Context {
  int device = 0;
  cuda::Call call;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("context", device, call.stream, call.workspace, call.workspace_bytes);
  }
};

struct Device {
  int device = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("device", device);
  }
};

// Enqueues an op on the context's device. Releases the GIL, because the driver waits while a stream's queue is full and
// while it loads kernels.
template <class Op>
cuda::Status enqueue(Context& context, const Op& op, cuda::Status (*launch)(const cuda::Call&, const Op&)) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(context.device);
  cuda::Status status = guard.status();
  if (status.ok()) status = cuda::device_limits(context.device, context.call.limits);
  return status.ok() ? launch(context.call, op) : status;
}

// Defines function `name` of the module: enqueues an op on the context's device. `title` names the op in errors.
template <class Op>
void bind(py::module_& m, const std::string& name, const std::string& title,
          cuda::Status (*launch)(const cuda::Call&, const Op&)) {
  const std::string arguments = argument_names<Context, Op>().text;
  m.def(
      name.c_str(),
      [=](const py::args& arguments) {
        Context context;
        Op op;
        read_arguments(name, arguments, context, op);
        const cuda::Status status = enqueue(context, op, launch);
        if (status.ok()) return;
        const std::string message = title + " on " + sizes_of(op) + ": " + describe(status);
        if (status.code == cuda::kTooManyPixels) throw py::value_error(message);
        throw std::runtime_error(message);
      },
      ("Arguments: " + arguments + ". Writes the results; gradients with address 0 are not computed").c_str());
}

cuda::Status check_kernels(int device) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  return guard.status().ok() ? cuda::check_kernels() : guard.status();
}

// The reason why no kernel of this build runs on a device, or None.
py::object problem(int device) {
  const cuda::Status status = check_kernels(device);
  return status.ok() ? py::object(py::none()) : py::object(py::str(describe(status)));
}

cuda::DeviceLimits limits_of(int device) {
  cuda::DeviceLimits limits;
  const cuda::Status status = cuda::device_limits(device, limits);
  if (!status.ok()) throw std::runtime_error(describe(status));
  return limits;
}

DecoderShape shape_of(const std::string& op, const py::tuple& description) {
  DecoderShape shape;
  read_description(op, "shape", description.ptr(), shape);
  return shape;
}

// Workspace queries: bytes of workspace that an op needs.
void bind_workspaces(py::module_& m) {
  m.def("adaln_block_forward_workspace", &cuda::adaln_block_forward_workspace, py::arg("D"));
  m.def("modulate_forward_workspace", &cuda::modulate_forward_workspace, py::arg("D"));
  m.def(
      "adaln_block_backward_workspace",
      [](int device, int64_t rows, int width) {
        return cuda::adaln_block_backward_workspace(limits_of(device), rows, width);
      },
      py::arg("device"), py::arg("rows"), py::arg("D"));
  m.def(
      "modulate_backward_workspace",
      [](int device, int64_t rows, int width) {
        return cuda::modulate_backward_workspace(limits_of(device), rows, width);
      },
      py::arg("device"), py::arg("rows"), py::arg("D"));
  m.def(
      "pixel_decoder_forward_workspace",
      [](const py::tuple& shape) {
        return cuda::pixel_decoder_forward_workspace(shape_of("pixel_decoder_forward_workspace", shape));
      },
      py::arg("shape"));
  m.def("pixel_decoder_backward_workspace", [](const py::args& arguments) {
    Device device;
    cuda::PixelDecoderBackward op;
    read_arguments("pixel_decoder_backward_workspace", arguments, device, op);
    return cuda::pixel_decoder_backward_workspace(limits_of(device.device), op);
  });
  m.def("flow_matching_loss_forward_workspace", [](const py::args& arguments) {
    Device device;
    cuda::FlowMatchingLossForward op;
    read_arguments("flow_matching_loss_forward_workspace", arguments, device, op);
    return cuda::flow_matching_loss_forward_workspace(op);
  });
  m.def("loss_keeps_gradient", [](const py::args& arguments) {
    cuda::FlowMatchingLossInputs inputs;
    read_arguments("loss_keeps_gradient", arguments, inputs);
    return cuda::loss_keeps_gradient(inputs);
  });
  m.def("flow_matching_loss_backward_workspace", [](const py::args& arguments) {
    Device device;
    cuda::FlowMatchingLossBackward op;
    read_arguments("flow_matching_loss_backward_workspace", arguments, device, op);
    return cuda::flow_matching_loss_backward_workspace(limits_of(device.device), op);
  });
  m.def("pixel_decoder_loss_workspace", [](const py::args& arguments) {
    Device device;
    cuda::PixelDecoderLoss op;
    read_arguments("pixel_decoder_loss_workspace", arguments, device, op);
    return cuda::pixel_decoder_loss_workspace(limits_of(device.device), op);
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("problem", &problem, py::arg("device"), "The reason why no kernel of this build runs on the device, or None");
  m.def(
      "device_limits",
      [](int device) {
        const cuda::DeviceLimits limits = limits_of(device);
        return py::make_tuple(limits.multiprocessors, limits.shared_bytes);
      },
      py::arg("device"), "(multiprocessors, maximum shared memory per thread block in bytes)");
  m.def("padded_rows", &cuda::padded_rows, py::arg("pixels"), "Rows of an array of activations");
  bind_workspaces(m);
  bind(m, "adaln_block_forward", "adaln_block", &cuda::adaln_block_forward);
  bind(m, "adaln_block_backward", "adaln_block_backward", &cuda::adaln_block_backward);
  bind(m, "pixel_decoder_forward", "pixel_decoder", &cuda::pixel_decoder_forward);
  bind(m, "pixel_decoder_backward", "pixel_decoder_backward", &cuda::pixel_decoder_backward);
  bind(m, "modulate_forward", "upsample_modulate", &cuda::modulate_forward);
  bind(m, "modulate_backward", "upsample_modulate_backward", &cuda::modulate_backward);
  bind(m, "flow_matching_loss_forward", "flow_matching_loss", &cuda::flow_matching_loss_forward);
  bind(m, "flow_matching_loss_backward", "flow_matching_loss_backward", &cuda::flow_matching_loss_backward);
  bind(m, "pixel_decoder_loss", "pixel_decoder_loss", &cuda::pixel_decoder_loss);
  bind(m, "scaled_product", "scaled_product", &cuda::scaled_product);
}

}  // namespace deco::python

#ifndef DECO_EMULATION
PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of deco_kernels";
  deco::python::bind_cuda(m);
}
#endif
