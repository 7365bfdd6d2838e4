// Python module _native_cuda. Tensors come as addresses and plain integers, already checked by the caller. A context is
// (device, stream, workspace address, workspace bytes). Functions enqueue kernels and return; a failure raises
// RuntimeError with the op, its sizes and what CUDA says.
#include "bindings_cuda.h"

#include <string>

#include "deco/cuda/adaln_block.h"
#include "deco/cuda/flow_matching_loss.h"
#include "deco/cuda/pixel_decoder.h"
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

// Runs launch(call) on the context's device and raises what went wrong; sizes() describes the op's sizes.
template <class Launch, class Sizes>
void run(const py::tuple& context, const char* op, const Sizes& sizes, const Launch& launch) {
  Integers in(context);
  const int device = static_cast<int>(in.next());
  cuda::Call call;
  call.stream = in.next_address();
  call.workspace = in.next_address();
  call.workspace_bytes = in.next();
  const DeviceGuard guard(device);
  cuda::Status status = guard.status();
  if (status.ok()) status = cuda::device_limits(device, call.limits);
  if (status.ok()) status = launch(call);
  if (status.ok()) return;
  const std::string message = std::string(op) + " on " + sizes() + ": " + describe(status);
  if (status.code == cuda::kTooManyPixels) throw py::value_error(message);
  throw std::runtime_error(message);
}

std::string sizes_of(const DecoderShape& s) {
  return "image [" + std::to_string(s.batch) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.height) +
         ", " + std::to_string(s.width) + "], patch_size " + std::to_string(s.patch_size) + ", D " +
         std::to_string(s.decoder_width) + ", N " + std::to_string(s.depth);
}

// Why no kernel of this build runs on a device, or None.
py::object problem(int device) {
  const DeviceGuard guard(device);
  const cuda::Status status = guard.status().ok() ? cuda::check_kernels() : guard.status();
  return status.ok() ? py::object(py::none()) : py::object(py::str(describe(status)));
}

cuda::DeviceLimits limits_of(int device) {
  cuda::DeviceLimits limits;
  const cuda::Status status = cuda::device_limits(device, limits);
  if (!status.ok()) throw std::runtime_error(describe(status));
  return limits;
}

std::string sizes_of(int64_t rows, int width) {
  return "[" + std::to_string(rows) + ", " + std::to_string(width) + "]";
}

void adaln_block_forward(const py::tuple& context, int64_t rows, int width, const py::tuple& h, const py::tuple& cond,
                         const py::tuple& weights, int64_t out, float eps) {
  cuda::AdalnBlockForward op;
  op.rows = rows;
  op.width = width;
  op.h = read_rows(h);
  op.cond = read_rows(cond);
  Integers arrays(weights);
  op.weights = read_block_weights(arrays);
  op.out = reinterpret_cast<void*>(out);
  op.eps = eps;
  run(
      context, "adaln_block", [&] { return sizes_of(rows, width); },
      [&](const cuda::Call& call) { return cuda::adaln_block_forward(call, op); });
}

int64_t adaln_block_backward_workspace(int device, int64_t rows, int width) {
  return cuda::adaln_block_backward_workspace(limits_of(device), rows, width);
}

void adaln_block_backward(const py::tuple& context, int64_t rows, int width, const py::tuple& grad_out,
                          const py::tuple& h, const py::tuple& cond, const py::tuple& weights, int64_t grad_h,
                          int64_t grad_cond, const py::tuple& grad_weights, float eps) {
  cuda::AdalnBlockBackward op;
  op.rows = rows;
  op.width = width;
  op.grad_out = read_rows(grad_out);
  op.h = read_rows(h);
  op.cond = read_rows(cond);
  Integers arrays(weights), grad_arrays(grad_weights);
  op.weights = read_block_weights(arrays);
  op.grad_h = reinterpret_cast<void*>(grad_h);
  op.grad_cond = reinterpret_cast<void*>(grad_cond);
  op.grad_weights = read_block_weights(grad_arrays);
  op.eps = eps;
  run(
      context, "adaln_block_backward", [&] { return sizes_of(rows, width); },
      [&](const cuda::Call& call) { return cuda::adaln_block_backward(call, op); });
}

int64_t pixel_decoder_forward_workspace(const py::tuple& shape) {
  return cuda::pixel_decoder_forward_workspace(read_decoder_shape(shape));
}

void pixel_decoder_forward(const py::tuple& context, const py::tuple& shape, const py::tuple& image,
                           const py::tuple& cond, const py::tuple& weights, const py::tuple& velocity, float eps) {
  cuda::PixelDecoderForward op;
  op.shape = read_decoder_shape(shape);
  op.image = read_image(image);
  op.cond = read_pixel_rows(cond);
  op.weights = read_decoder_weights(weights);
  op.velocity = read_image(velocity);
  op.eps = eps;
  run(
      context, "pixel_decoder", [&] { return sizes_of(op.shape); },
      [&](const cuda::Call& call) { return cuda::pixel_decoder_forward(call, op); });
}

int64_t pixel_decoder_backward_workspace(int device, const py::tuple& shape, int64_t chunk_pixels) {
  return cuda::pixel_decoder_backward_workspace(limits_of(device), read_decoder_shape(shape), chunk_pixels);
}

void pixel_decoder_backward(const py::tuple& context, const py::tuple& shape, const py::tuple& grad_velocity,
                            const py::tuple& image, const py::tuple& cond, const py::tuple& weights,
                            const py::tuple& grad_image, int64_t grad_cond, const py::tuple& grad_weights, float eps,
                            int64_t chunk_pixels) {
  cuda::PixelDecoderBackward op;
  op.shape = read_decoder_shape(shape);
  op.grad_velocity = read_image(grad_velocity);
  op.image = read_image(image);
  op.cond = read_pixel_rows(cond);
  op.weights = read_decoder_weights(weights);
  op.grad_image = read_image(grad_image);
  op.grad_cond = reinterpret_cast<void*>(grad_cond);
  op.grad_weights = read_decoder_weights(grad_weights);
  op.eps = eps;
  op.chunk_pixels = chunk_pixels;
  run(
      context, "pixel_decoder_backward", [&] { return sizes_of(op.shape); },
      [&](const cuda::Call& call) { return cuda::pixel_decoder_backward(call, op); });
}

void modulate_forward(const py::tuple& context, int64_t rows, int width, const py::tuple& h, const py::tuple& cond,
                      const py::tuple& weights, int64_t modulated, int64_t gate, float eps) {
  cuda::ModulateForward op;
  op.rows = rows;
  op.width = width;
  op.h = read_rows(h);
  op.cond = read_rows(cond);
  op.weights = read_modulation(weights);
  op.modulated = reinterpret_cast<void*>(modulated);
  op.gate = reinterpret_cast<void*>(gate);
  op.eps = eps;
  run(
      context, "upsample_modulate", [&] { return sizes_of(rows, width); },
      [&](const cuda::Call& call) { return cuda::modulate_forward(call, op); });
}

int64_t modulate_backward_workspace(int device, int64_t rows, int width) {
  return cuda::modulate_backward_workspace(limits_of(device), rows, width);
}

void modulate_backward(const py::tuple& context, int64_t rows, int width, const py::tuple& grad_modulated,
                       const py::tuple& grad_gate, const py::tuple& h, const py::tuple& cond, const py::tuple& weights,
                       int64_t grad_h, int64_t grad_cond, const py::tuple& grad_weights, float eps) {
  cuda::ModulateBackward op;
  op.rows = rows;
  op.width = width;
  op.grad_modulated = read_rows(grad_modulated);
  op.grad_gate = read_rows(grad_gate);
  op.h = read_rows(h);
  op.cond = read_rows(cond);
  op.weights = read_modulation(weights);
  op.grad_h = reinterpret_cast<void*>(grad_h);
  op.grad_cond = reinterpret_cast<void*>(grad_cond);
  op.grad_weights = read_modulation(grad_weights);
  op.eps = eps;
  run(
      context, "upsample_modulate_backward", [&] { return sizes_of(rows, width); },
      [&](const cuda::Call& call) { return cuda::modulate_backward(call, op); });
}

// (B, H, W), pred, target, (frequency_weight, sample_weight)
cuda::FlowMatchingLossInputs read_loss_inputs(const py::tuple& shape, const py::tuple& pred, const py::tuple& target,
                                              const py::tuple& weights) {
  Integers sizes(shape), arrays(weights);
  cuda::FlowMatchingLossInputs inputs;
  inputs.batch = sizes.next();
  inputs.height = sizes.next();
  inputs.width = sizes.next();
  inputs.pred = read_image(pred);
  inputs.target = read_image(target);
  inputs.frequency_weight = read_array(arrays);
  inputs.sample_weight = read_array(arrays);
  return inputs;
}

std::string sizes_of(const cuda::FlowMatchingLossInputs& inputs) {
  return "pred [" + std::to_string(inputs.batch) + ", 3, " + std::to_string(inputs.height) + ", " +
         std::to_string(inputs.width) + "]";
}

cuda::FlowMatchingLossForward read_loss_forward(const py::tuple& shape, const py::tuple& pred, const py::tuple& target,
                                                const py::tuple& weights, float frequency_scale,
                                                const py::tuple& losses) {
  Integers addresses(losses);
  cuda::FlowMatchingLossForward op;
  op.inputs = read_loss_inputs(shape, pred, target, weights);
  op.frequency_scale = frequency_scale;
  for (float** loss : {&op.total, &op.pixel, &op.frequency}) *loss = static_cast<float*>(addresses.next_address());
  return op;
}

int64_t flow_matching_loss_forward_workspace(int, const py::tuple& shape, const py::tuple& pred,
                                             const py::tuple& target, const py::tuple& weights, float frequency_scale,
                                             const py::tuple& losses) {
  return cuda::flow_matching_loss_forward_workspace(
      read_loss_forward(shape, pred, target, weights, frequency_scale, losses));
}

void flow_matching_loss_forward(const py::tuple& context, const py::tuple& shape, const py::tuple& pred,
                                const py::tuple& target, const py::tuple& weights, float frequency_scale,
                                const py::tuple& losses) {
  const auto op = read_loss_forward(shape, pred, target, weights, frequency_scale, losses);
  run(
      context, "flow_matching_loss", [&] { return sizes_of(op.inputs); },
      [&](const cuda::Call& call) { return cuda::flow_matching_loss_forward(call, op); });
}

cuda::FlowMatchingLossBackward read_loss_backward(const py::tuple& shape, const py::tuple& pred,
                                                  const py::tuple& target, const py::tuple& weights,
                                                  float frequency_scale, const py::tuple& grad_losses,
                                                  const py::tuple& gradients) {
  Integers addresses(grad_losses), arrays(gradients);
  cuda::FlowMatchingLossBackward op;
  op.inputs = read_loss_inputs(shape, pred, target, weights);
  op.frequency_scale = frequency_scale;
  for (const float** loss : {&op.grad_total, &op.grad_pixel, &op.grad_frequency})
    *loss = static_cast<const float*>(addresses.next_address());
  for (Array* gradient : {&op.grad_pred, &op.grad_target, &op.grad_frequency_weight, &op.grad_sample_weight})
    *gradient = read_array(arrays);
  return op;
}

int64_t flow_matching_loss_backward_workspace(int device, const py::tuple& shape, const py::tuple& pred,
                                              const py::tuple& target, const py::tuple& weights, float frequency_scale,
                                              const py::tuple& grad_losses, const py::tuple& gradients) {
  return cuda::flow_matching_loss_backward_workspace(
      limits_of(device), read_loss_backward(shape, pred, target, weights, frequency_scale, grad_losses, gradients));
}

void flow_matching_loss_backward(const py::tuple& context, const py::tuple& shape, const py::tuple& pred,
                                 const py::tuple& target, const py::tuple& weights, float frequency_scale,
                                 const py::tuple& grad_losses, const py::tuple& gradients) {
  const auto op = read_loss_backward(shape, pred, target, weights, frequency_scale, grad_losses, gradients);
  run(
      context, "flow_matching_loss_backward", [&] { return sizes_of(op.inputs); },
      [&](const cuda::Call& call) { return cuda::flow_matching_loss_backward(call, op); });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("problem", &problem, py::arg("device"), "Why no kernel of this build runs on the device, or None");
  m.def(
      "device_limits",
      [](int device) {
        const cuda::DeviceLimits limits = limits_of(device);
        return py::make_tuple(limits.multiprocessors, limits.shared_bytes);
      },
      py::arg("device"), "(multiprocessors, largest shared memory of a block in bytes)");
  m.def("adaln_block_forward_workspace", &cuda::adaln_block_forward_workspace,
        "Bytes of workspace that adaln_block_forward needs for D");
  m.def("adaln_block_forward", &adaln_block_forward,
        "context, rows, D, h, cond, eight weights, out (address, written), eps");
  m.def("adaln_block_backward_workspace", &adaln_block_backward_workspace,
        "Bytes of workspace that adaln_block_backward needs for device, rows, D");
  m.def(
      "adaln_block_backward", &adaln_block_backward,
      "context, rows, D, grad_out, h, cond, eight weights, then written: grad_h (address) and, where the address is not "
      "0, grad_cond (address), eight gradients of weights; eps");
  m.def("pixel_decoder_forward_workspace", &pixel_decoder_forward_workspace,
        "Bytes of workspace that pixel_decoder_forward needs for (B, C, H, W, p, D, N)");
  m.def(
      "pixel_decoder_forward", &pixel_decoder_forward,
      "context, (B, C, H, W, p, D, N), image, cond rows, twelve weights, velocity (written; unit stride along a row), eps");
  m.def("pixel_decoder_backward_workspace", &pixel_decoder_backward_workspace,
        "Bytes of workspace that pixel_decoder_backward needs for device, (B, C, H, W, p, D, N), chunk_pixels");
  m.def(
      "pixel_decoder_backward", &pixel_decoder_backward,
      "context, (B, C, H, W, p, D, N), grad_velocity, image, cond rows, twelve weights, then written where the address "
      "is not 0: grad_image, grad_cond (address), twelve gradients of weights; eps, chunk_pixels");
  m.def("modulate_forward_workspace", &cuda::modulate_forward_workspace,
        "Bytes of workspace that modulate_forward needs for D");
  m.def("modulate_forward", &modulate_forward,
        "context, rows, D, h, cond, norm and mod weights, modulated and gate (addresses, written), eps");
  m.def("modulate_backward_workspace", &modulate_backward_workspace,
        "Bytes of workspace that modulate_backward needs for device, rows, D");
  m.def(
      "modulate_backward", &modulate_backward,
      "context, rows, D, grad_modulated, grad_gate, h, cond, norm and mod weights, then written: grad_h (address) and, "
      "where the address is not 0, grad_cond (address), four gradients of weights; eps");
  m.def("flow_matching_loss_forward_workspace", &flow_matching_loss_forward_workspace,
        "Bytes of workspace that flow_matching_loss_forward needs for device and what follows its context");
  m.def(
      "flow_matching_loss_forward", &flow_matching_loss_forward,
      "context, (B, H, W), pred, target, (frequency_weight, sample_weight), frequency_scale, (total, pixel, frequency: "
      "addresses, written where not 0)");
  m.def("flow_matching_loss_backward_workspace", &flow_matching_loss_backward_workspace,
        "Bytes of workspace that flow_matching_loss_backward needs for device and what follows its context");
  m.def("flow_matching_loss_backward", &flow_matching_loss_backward,
        "context, (B, H, W), pred, target, (frequency_weight, sample_weight), frequency_scale, gradients of (total, "
        "pixel, frequency) (addresses; 0: zero), then written where the address is not 0: four gradients");
}

}  // namespace deco::python

#ifndef DECO_EMULATION
PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of deco_kernels";
  deco::python::bind_cuda(m);
}
#endif
