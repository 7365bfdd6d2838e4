"""Checks a backend against the float64 formula: random inputs, the rule of error, and a comparison of an op's results.

The rule of error, for every output and gradient, with relative error |actual - exact| / |exact| (L2) against float64:

    float32:            at most max(2 x eager's, 2e-6 for outputs, 5e-6 for gradients)
    bfloat16, float16:  at most 1.2 x (outputs) and 1.5 x (gradients) eager's

where eager is plain PyTorch on the same device, in float32 or under autocast with float32 weights. For tensors of at
least 1,000 elements the mean signed error is at most 0.25 x that bound x RMS(exact). Inputs are N(0, 1), weights
N(0, 1/fan-in); the rule is meant for at least 4,096 pixels.
"""

import importlib
import math
from typing import NamedTuple

import torch

from deco_kernels import ops
from deco_kernels.signatures import TENSORS

OPS = ("adaln_block", "pixel_decoder", "upsample_modulate", "pixel_decoder_from_tokens", "flow_matching_loss")
_LOSSES = ("flow_matching_loss", "frequency_loss")


class Inputs(NamedTuple):
    """One call of an op: its tensors by argument name, its options, and the gradients of its outputs."""

    op: str
    tensors: dict[str, torch.Tensor | None]
    options: dict[str, int | float]
    grad_outputs: tuple[torch.Tensor, ...]


class Results(NamedTuple):
    """Outputs in order and gradients by argument name."""

    outputs: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]


class Comparison(NamedTuple):
    """One output or gradient held against the rule of error; `bias` is the mean signed error over RMS(exact)."""

    name: str
    error: float
    bound: float
    bias: float
    bias_bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and self.bias <= self.bias_bound

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.error:.3g} (bound {self.bound:.3g}), "
            f"bias {self.bias:.3g} (bound {self.bias_bound:.3g})"
        )


def random_inputs(
    op: str,
    *,
    dtype: torch.dtype = torch.float32,
    other_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype = torch.float32,
    width: int = 32,
    depth: int = 3,
    patch_size: int = 16,
    channels: int = 3,
    image_size: tuple[int, int, int] = (1, 64, 64),
    token_width: int = 48,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random arguments of an op.

    Args:
        op: its name in `deco_kernels.ops`.
        dtype: of the activation (cond, tokens, h; pred for the losses).
        other_dtype: of the image (target for the losses); by default float32 (`dtype` for the losses).
        weight_dtype: of the weights (float32 for norm weights, frequency and sample weights under half precision).
        width, depth, patch_size, channels: D, N, p, C.
        image_size: (B, H, W); ops on rows work on its B*H*W pixels.
        token_width: Z.
    """
    draw = _Draw(dtype, dtype if dtype is torch.float64 else weight_dtype, device, seed)
    pixels = patch_size**2
    batch, rows, columns = image_size
    token_count = batch * (rows // patch_size) * (columns // patch_size)
    image_shape, row_shape = (batch, channels, rows, columns), (token_count, pixels, width)
    up = {
        "up_weight": draw.weight(pixels * width, token_width),
        "up_bias": draw.bias(pixels * width),
    }
    if op in _LOSSES:
        tensors = {
            "pred": draw.normal(*image_shape),
            "target": draw.normal(*image_shape, dtype=other_dtype),
            "frequency_weight": draw.normal(3, 8, 8, dtype=draw.exact).abs() + 0.1,
            "sample_weight": draw.normal(batch, dtype=draw.exact).abs() + 0.1,
        }
        count, options = (3, {"frequency_scale": 0.7}) if op == "flow_matching_loss" else (1, {})
        grad_outputs = tuple(draw.normal(dtype=draw.exact) for _ in range(count))
    elif op == "adaln_block":
        tensors = {"h": draw.normal(*row_shape), "cond": draw.normal(*row_shape), **draw.block(width)}
        options, grad_outputs = {}, (draw.normal(*row_shape),)
    elif op == "upsample_modulate":
        block = draw.block(width)
        tensors = {"h": draw.normal(*row_shape), "tokens": draw.normal(token_count, token_width), **up}
        tensors |= {name: block[name] for name in TENSORS[op] if name in block}
        options, grad_outputs = {}, (draw.normal(*row_shape), draw.normal(*row_shape))
    else:
        tensors = {"image": draw.normal(*image_shape, dtype=other_dtype or draw.exact)}
        if op == "pixel_decoder":
            tensors |= {"cond": draw.normal(*row_shape)}
        else:
            tensors |= {"tokens": draw.normal(token_count, token_width), **up}
        tensors |= draw.decoder(width, depth, pixels, channels)
        options, grad_outputs = {"patch_size": patch_size}, (draw.normal(*image_shape),)
    return Inputs(op, tensors, options, grad_outputs)


class _Draw:
    """Random tensors from one generator: activations N(0, 1), weights N(0, 1/fan-in)."""

    def __init__(self, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device | str, seed: int):
        self.dtype, self.weight_dtype, self.device = dtype, weight_dtype, device
        self.exact = torch.float64 if dtype is torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(device=self.device, dtype=dtype or self.dtype)

    def weight(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, dtype=self.weight_dtype, scale=shape[-1] ** -0.5)

    def bias(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, dtype=self.weight_dtype, scale=0.5)

    def block(self, width: int, *stack: int) -> dict[str, torch.Tensor]:
        return {
            "norm_weight": 1 + self.normal(*stack, width, dtype=self.exact, scale=0.3),
            "norm_bias": self.normal(*stack, width, dtype=self.exact, scale=0.3),
            "mod_weight": self.weight(*stack, 3 * width, width),
            "mod_bias": self.bias(*stack, 3 * width),
            "fc1_weight": self.weight(*stack, width, width),
            "fc1_bias": self.bias(*stack, width),
            "fc2_weight": self.weight(*stack, width, width),
            "fc2_bias": self.bias(*stack, width),
        }

    def decoder(self, width: int, depth: int, pixels: int, channels: int) -> dict[str, torch.Tensor]:
        return {
            "pixel_weight": self.weight(width, channels),
            "pixel_table": self.normal(pixels, width, dtype=self.weight_dtype),
            **self.block(width, depth),
            "head_weight": self.weight(channels, width),
            "head_bias": self.bias(channels),
        }


def in_float64(inputs: Inputs) -> Inputs:
    """The same values in float64."""
    return inputs._replace(
        tensors={name: None if t is None else t.double() for name, t in inputs.tensors.items()},
        grad_outputs=tuple(gradient.double() for gradient in inputs.grad_outputs),
    )


def run(inputs: Inputs, backend: str | None = None) -> Results:
    """The op through its public function, with every gradient."""
    return _differentiate(inputs, lambda tensors: getattr(ops, inputs.op)(**tensors, **inputs.options, backend=backend))


def exact_results(inputs: Inputs) -> Results:
    """The float64 formula on the same values."""
    return run(in_float64(inputs), "reference")


def eager_results(inputs: Inputs) -> Results:
    """Plain PyTorch: in float32, or under autocast to the activation's dtype with the weights as they are."""
    return _differentiate(inputs, lambda tensors: eager(inputs.op, tensors, inputs.options))


def eager(op: str, tensors: dict[str, torch.Tensor | None], options: dict[str, int | float]):
    """The op's formula in plain PyTorch operations, as a training script under autocast computes it."""
    module = "flow_matching_loss" if op in _LOSSES else op
    reference = importlib.import_module(f"deco_kernels.backends.reference.{module}")
    formula = reference.frequency_formula if op == "frequency_loss" else reference.formula
    options = dict(options) if op in _LOSSES else {**options, "eps": options.get("eps", 1e-6)}
    if op in _LOSSES:
        tensors = {name: None if t is None else t.to(_loss_dtype(t)) for name, t in tensors.items()}
        return formula(*tensors.values(), *options.values())
    activation = next(tensors[name] for name in ("cond", "tokens", "h") if name in tensors)
    if activation.dtype in (torch.float32, torch.float64):
        return formula(*(tensor.to(activation.dtype) for tensor in tensors.values()), *options.values())
    if "pixel_table" in tensors:
        tensors = {**tensors, "pixel_table": tensors["pixel_table"].to(activation.dtype)}
    with torch.autocast(activation.device.type, activation.dtype):
        return formula(*tensors.values(), *options.values())


def _loss_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _differentiate(inputs: Inputs, function) -> Results:
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()
    }
    outputs = function(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grad_outputs = [g.to(output.dtype) for g, output in zip(inputs.grad_outputs, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(given.values()), grad_outputs, materialize_grads=True)
    detached = tuple(output.detach() for output in outputs)
    return Results(detached, dict(zip(given, gradients, strict=True)))


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """|actual - exact| / |exact| in L2 over all elements, in float64; infinite where a value is not finite."""
    difference = torch.linalg.vector_norm(actual.double() - exact.double()).item()
    norm = torch.linalg.vector_norm(exact.double()).item()
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


def relative_bias(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """|mean(actual - exact)| / RMS(exact), in float64; 0 for fewer than 1,000 elements."""
    if exact.numel() < 1000:
        return 0.0
    mean = (actual.double() - exact.double()).mean().abs().item()
    rms = exact.double().square().mean().sqrt().item()
    if mean == 0:
        return 0.0
    return mean / rms if rms > 0 and math.isfinite(mean) else math.inf


def error_bound(dtype: torch.dtype, eager_error: float, *, gradient: bool) -> float:
    """The rule of error for a result computed in `dtype`, given eager's relative error."""
    if dtype in (torch.bfloat16, torch.float16):
        return (1.5 if gradient else 1.2) * eager_error
    return max(2 * eager_error, 5e-6 if gradient else 2e-6)


def compare(
    inputs: Inputs, actual: Results, exact: Results | None = None, eager_: Results | None = None
) -> list[Comparison]:
    """Every output and gradient of `actual` against the rule of error.

    `exact` and `eager_` are computed unless given: `exact_results(inputs)` and `eager_results(inputs)`.
    """
    exact = exact_results(inputs) if exact is None else exact
    eager_ = eager_results(inputs) if eager_ is None else eager_
    activation = next(iter(inputs.grad_outputs)).dtype
    rows = []
    for index, output in enumerate(exact.outputs):
        rows.append(
            _compare(f"output {index}", activation, False, actual.outputs[index], eager_.outputs[index], output)
        )
    for name, gradient in exact.gradients.items():
        dtype = inputs.tensors[name].dtype if inputs.op in _LOSSES else activation
        rows.append(_compare(f"grad {name}", dtype, True, actual.gradients[name], eager_.gradients[name], gradient))
    return rows


def _compare(name, dtype, is_gradient, actual, eager_, exact) -> Comparison:
    bound = error_bound(dtype, relative_error(eager_, exact), gradient=is_gradient)
    return Comparison(name, relative_error(actual, exact), bound, relative_bias(actual, exact), 0.25 * bound)
