// Python module _native_cpu. Tensors come as addresses and plain integers, already checked by the caller; the GIL is
// released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "deco/flow_matching_loss.h"
#include "deco/isa.h"
#include "deco/pixel_decoder.h"
#include "deco/pixel_decoder_from_tokens.h"
#include "deco/upsample_modulate.h"
#include "descriptions.h"

namespace py = pybind11;

namespace {

using deco::Array;
using deco::python::Integers;
using deco::python::read_array;
using deco::python::read_block_weights;
using deco::python::read_decoder_shape;
using deco::python::read_decoder_weights;
using deco::python::read_image;
using deco::python::read_modulation;
using deco::python::read_pixel_rows;
using deco::python::read_rows;

void adaln_block_forward(int64_t rows, int width, const py::tuple& h, const py::tuple& cond, const py::tuple& weights,
                         const py::tuple& out, float eps, int threads) {
  deco::cpu::AdalnBlockForward call;
  call.rows = rows;
  call.width = width;
  call.h = read_rows(h);
  call.cond = read_rows(cond);
  Integers arrays(weights);
  call.weights = read_block_weights(arrays);
  call.out = read_rows(out);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::adaln_block_forward(call);
}

void adaln_block_backward(int64_t rows, int width, const py::tuple& grad_out, const py::tuple& h, const py::tuple& cond,
                          const py::tuple& weights, const py::tuple& grad_h, const py::tuple& grad_cond,
                          const py::tuple& grad_weights, float eps, int threads) {
  deco::cpu::AdalnBlockBackward call;
  call.rows = rows;
  call.width = width;
  call.grad_out = read_rows(grad_out);
  call.h = read_rows(h);
  call.cond = read_rows(cond);
  Integers arrays(weights), grad_arrays(grad_weights);
  call.weights = read_block_weights(arrays);
  call.grad_h = read_rows(grad_h);
  call.grad_cond = read_rows(grad_cond);
  call.grad_weights = read_block_weights(grad_arrays);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::adaln_block_backward(call);
}

void pixel_decoder_forward(const py::tuple& shape, const py::tuple& image, const py::tuple& cond,
                           const py::tuple& weights, const py::tuple& velocity, float eps, int threads) {
  deco::cpu::PixelDecoderForward call;
  call.shape = read_decoder_shape(shape);
  call.image = read_image(image);
  call.cond = read_pixel_rows(cond);
  call.weights = read_decoder_weights(weights);
  call.velocity = read_image(velocity);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::pixel_decoder_forward(call);
}

void pixel_decoder_backward(const py::tuple& shape, const py::tuple& grad_velocity, const py::tuple& image,
                            const py::tuple& cond, const py::tuple& weights, const py::tuple& grad_image,
                            const py::tuple& grad_cond, const py::tuple& grad_weights, float eps, int threads) {
  deco::cpu::PixelDecoderBackward call;
  call.shape = read_decoder_shape(shape);
  call.grad_velocity = read_image(grad_velocity);
  call.image = read_image(image);
  call.cond = read_pixel_rows(cond);
  call.weights = read_decoder_weights(weights);
  call.grad_image = read_image(grad_image);
  call.grad_cond = read_pixel_rows(grad_cond);
  call.grad_weights = read_decoder_weights(grad_weights);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::pixel_decoder_backward(call);
}

// (T, Z, P, D), token rows, up_weight and up_bias
deco::UpsampleArrays read_upsample(const py::tuple& sizes, const py::tuple& rows, const py::tuple& weights) {
  deco::UpsampleArrays upsample;
  Integers in_sizes(sizes), in_weights(weights);
  upsample.tokens = in_sizes.next();
  upsample.token_width = in_sizes.next();
  upsample.pixels_per_token = static_cast<int>(in_sizes.next());
  upsample.width = static_cast<int>(in_sizes.next());
  upsample.rows = read_rows(rows);
  upsample.weight = read_array(in_weights);
  upsample.bias = read_array(in_weights);
  return upsample;
}

void pixel_decoder_from_tokens_forward(const py::tuple& shape, const py::tuple& image, const py::tuple& upsample_sizes,
                                       const py::tuple& tokens, const py::tuple& upsample_weights,
                                       const py::tuple& weights, const py::tuple& velocity, float eps, int threads) {
  deco::cpu::PixelDecoderFromTokensForward call;
  call.shape = read_decoder_shape(shape);
  call.image = read_image(image);
  call.upsample = read_upsample(upsample_sizes, tokens, upsample_weights);
  call.weights = read_decoder_weights(weights);
  call.velocity = read_image(velocity);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::pixel_decoder_from_tokens_forward(call);
}

void upsample_modulate_forward(const py::tuple& upsample_sizes, const py::tuple& tokens,
                               const py::tuple& upsample_weights, const py::tuple& h, const py::tuple& weights,
                               const py::tuple& modulated, const py::tuple& gate, float eps, int threads) {
  deco::cpu::UpsampleModulateForward call;
  call.upsample = read_upsample(upsample_sizes, tokens, upsample_weights);
  call.h = read_pixel_rows(h);
  call.weights = read_modulation(weights);
  call.modulated = read_pixel_rows(modulated);
  call.gate = read_pixel_rows(gate);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::upsample_modulate_forward(call);
}

void upsample_modulate_backward(const py::tuple& upsample_sizes, const py::tuple& tokens,
                                const py::tuple& upsample_weights, const py::tuple& grad_modulated,
                                const py::tuple& grad_gate, const py::tuple& h, const py::tuple& weights,
                                const py::tuple& grad_h, const py::tuple& grad_cond, const py::tuple& grad_weights,
                                float eps, int threads) {
  deco::cpu::UpsampleModulateBackward call;
  call.upsample = read_upsample(upsample_sizes, tokens, upsample_weights);
  call.grad_modulated = read_pixel_rows(grad_modulated);
  call.grad_gate = read_pixel_rows(grad_gate);
  call.h = read_pixel_rows(h);
  call.weights = read_modulation(weights);
  call.grad_h = read_pixel_rows(grad_h);
  call.grad_cond = read_pixel_rows(grad_cond);
  call.grad_weights = read_modulation(grad_weights);
  call.eps = eps;
  call.threads = threads;
  py::gil_scoped_release release;
  deco::cpu::upsample_modulate_backward(call);
}

// Inputs of the losses: (B, H, W), the two images, [3, 8, 8] and [B] in float32; the workspace comes from the caller.
deco::cpu::FlowMatchingLossInputs read_loss_inputs(const py::tuple& shape, const py::tuple& pred,
                                                   const py::tuple& target, intptr_t frequency_weight,
                                                   intptr_t sample_weight, std::vector<double>& workspace,
                                                   int threads) {
  Integers in(shape);
  deco::cpu::FlowMatchingLossInputs inputs;
  inputs.batch = in.next();
  inputs.height = in.next();
  inputs.width = in.next();
  inputs.pred = read_image(pred);
  inputs.target = read_image(target);
  inputs.frequency_weight = reinterpret_cast<const float*>(frequency_weight);
  inputs.sample_weight = reinterpret_cast<const float*>(sample_weight);
  inputs.threads = threads;
  workspace.resize(static_cast<size_t>(deco::cpu::loss_workspace_size(inputs.batch, threads)));
  inputs.workspace = workspace.data();
  return inputs;
}

void flow_matching_loss_forward(const py::tuple& shape, const py::tuple& pred, const py::tuple& target,
                                intptr_t frequency_weight, intptr_t sample_weight, double frequency_scale,
                                intptr_t total, intptr_t pixel, intptr_t frequency, int threads) {
  std::vector<double> workspace;
  deco::cpu::FlowMatchingLossForward call;
  call.inputs = read_loss_inputs(shape, pred, target, frequency_weight, sample_weight, workspace, threads);
  call.frequency_scale = frequency_scale;
  call.total = reinterpret_cast<float*>(total);
  call.pixel = reinterpret_cast<float*>(pixel);
  call.frequency = reinterpret_cast<float*>(frequency);
  py::gil_scoped_release release;
  deco::cpu::flow_matching_loss_forward(call);
}

void flow_matching_loss_backward(const py::tuple& shape, const py::tuple& pred, const py::tuple& target,
                                 intptr_t frequency_weight, intptr_t sample_weight, double grad_pixel,
                                 double grad_frequency, const py::tuple& grad_images, intptr_t grad_frequency_weight,
                                 intptr_t grad_sample_weight, int threads) {
  std::vector<double> workspace;
  deco::cpu::FlowMatchingLossBackward call;
  call.inputs = read_loss_inputs(shape, pred, target, frequency_weight, sample_weight, workspace, threads);
  call.grad_pixel = grad_pixel;
  call.grad_frequency = grad_frequency;
  Integers in(grad_images);
  call.grad_pred = read_array(in);
  call.grad_target = read_array(in);
  call.grad_frequency_weight = reinterpret_cast<float*>(grad_frequency_weight);
  call.grad_sample_weight = reinterpret_cast<float*>(grad_sample_weight);
  py::gil_scoped_release release;
  deco::cpu::flow_matching_loss_backward(call);
}

}  // namespace

PYBIND11_MODULE(_native_cpu, m) {
  m.doc() = "CPU kernels of deco_kernels";
  m.def("usable_isas", &deco::cpu::usable_isas,
        "Instruction sets of this build that this processor runs, fastest first");
  m.def("current_isa", &deco::cpu::current_isa, "The instruction set in use");
  m.def("select_isa", &deco::cpu::select_isa, py::arg("name"),
        "Run every later call on this instruction set; ValueError if it is unknown or cannot run here");
  m.def("vector_lanes", &deco::cpu::vector_lanes, "Floats per vector of the instruction set in use");

  m.def("adaln_block_forward", &adaln_block_forward, "rows, D, h, cond, eight weights, out (written), eps, threads");
  m.def("adaln_block_backward", &adaln_block_backward,
        "rows, D, grad_out, h, cond, eight weights, then written where the address is not 0: grad_h, grad_cond, eight "
        "gradients of weights; eps, threads");
  m.def("pixel_decoder_forward", &pixel_decoder_forward,
        "(B, C, H, W, p, D, N), image, cond rows, twelve weights, velocity (written), eps, threads");
  m.def(
      "pixel_decoder_backward", &pixel_decoder_backward,
      "(B, C, H, W, p, D, N), grad_velocity, image, cond rows, twelve weights, then written where the address is not 0: "
      "grad_image, grad_cond rows, twelve gradients of weights; eps, threads");
  m.def("pixel_decoder_from_tokens_forward", &pixel_decoder_from_tokens_forward,
        "(B, C, H, W, p, D, N), image, (T, Z, P, D), token rows, up_weight and up_bias, twelve weights, velocity "
        "(written), eps, threads");
  m.def("upsample_modulate_forward", &upsample_modulate_forward,
        "(T, Z, P, D), token rows, up_weight and up_bias, h rows, norm and mod weights, modulated and gate rows "
        "(written), eps, threads");
  m.def("upsample_modulate_backward", &upsample_modulate_backward,
        "(T, Z, P, D), token rows, up_weight and up_bias, grad_modulated, grad_gate and h rows, norm and mod weights, "
        "then written where the address is not 0: grad_h and grad_cond rows, gradients of norm and mod weights; eps, "
        "threads");

  m.def("flow_matching_loss_forward", &flow_matching_loss_forward,
        "(B, H, W), pred, target, frequency weight, sample weight or 0, frequency_scale, addresses of total, pixel and "
        "frequency (written; 0: not wanted), threads");
  m.def(
      "flow_matching_loss_backward", &flow_matching_loss_backward,
      "(B, H, W), pred, target, frequency weight, sample weight or 0, the gradients of the pixel and the frequency "
      "loss, arrays of the gradients of pred and target, those of the frequency and the sample weight (written; 0: not "
      "wanted), threads");
}
