"""Random arguments of every op: inputs N(0, 1), weights N(0, 1/fan-in)."""

from typing import Any, NamedTuple

import torch

from deco_kernels import signatures
from deco_kernels.model.arguments import require_sizes

OPS = (
    "adaln_block",
    "pixel_decoder",
    "upsample_modulate",
    "pixel_decoder_from_tokens",
    "pixel_decoder_loss",
    "pixel_decoder_loss_from_tokens",
    "flow_matching_loss",
)
LOSSES = ("flow_matching_loss", "frequency_loss")
ONE_PASS = ("pixel_decoder_loss", "pixel_decoder_loss_from_tokens")
"""Ops whose forward also computes the gradients; only their first output is differentiable."""
QUERY_WIDTH = 24
"""Zq."""
KEEPS_COND = ("upsample_modulate", "pixel_decoder_from_tokens")
"""Ops that keep the upsampled condition between forward and backward, or with `save_memory` compute it again."""
SAVE_MEMORY = ("pixel_decoder", *KEEPS_COND)
"""Ops with the argument `save_memory`."""


class Inputs(NamedTuple):
    """One call of an op: its tensors by argument name, its options, and the gradients of its outputs.

    Optional tensors may be left out. The gradient of an output that is not differentiable is 0.
    """

    op: str
    tensors: dict[str, torch.Tensor | None]
    options: dict[str, int | float | str]
    grad_outputs: tuple[torch.Tensor, ...]

    def in_order(self) -> list[torch.Tensor | None]:
        """The tensors as passed to operators, with None for those that are left out."""
        return [self.tensors.get(name) for name in signatures.OPS[self.op].names]

    def groups(self) -> tuple[Any, ...]:
        """The tensors as passed to backends, with weights in groups."""
        return signatures.grouped(signatures.OPS[self.op].group, self.in_order())


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
    query: str | None = None,
    head_norm: str = "layer",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random arguments of an op.

    Args:
        op: name of the op in `deco_kernels.ops`.
        dtype: dtype of the activation (cond, tokens, h; pred for the losses).
        other_dtype: dtype of the image and of the target; by default float32 (`dtype` for the losses alone).
        weight_dtype: dtype of the weights. Norm, frequency and sample weights are float32 unless `dtype` is float64.
        width, depth, patch_size, channels: D, N, p, C.
        image_size: (B, H, W); ops on rows have B*H*W rows.
        token_width: Z.
        query: None, "given" for the argument of this name, or "tokens" for query_tokens, with Zq = 24.
        head_norm: of a decoder.
        device: device of the tensors; values do not depend on it.
        seed: seed of the random generator.

    Raises ValueError for an unknown op, and ValueError or TypeError unless D, N, p, C and Z are integers of at least 1.
    """
    known = list(dict.fromkeys((*OPS, *LOSSES)))
    if op not in known:
        raise ValueError(f"op: expected one of {known}, got {op!r}")
    require_sizes(width=width, depth=depth, patch_size=patch_size, channels=channels, token_width=token_width)
    draw = _Draw(dtype, dtype if dtype is torch.float64 else weight_dtype, device, seed)
    pixels = patch_size**2
    batch, rows, columns = image_size
    token_count = batch * (rows // patch_size) * (columns // patch_size)
    image_shape, row_shape = (batch, channels, rows, columns), (token_count, pixels, width)
    tensors: dict[str, torch.Tensor | None]
    options: dict[str, int | float | str]
    up = {
        "up_weight": draw.weight(pixels * width, token_width),
        "up_bias": draw.bias(pixels * width),
    }
    if op in LOSSES:
        tensors = {
            "pred": draw.normal(*image_shape),
            "target": draw.normal(*image_shape, dtype=other_dtype),
            **draw.loss_weights(batch),
        }
        count, options = (3, {"frequency_scale": 0.7}) if op == "flow_matching_loss" else (1, {})
        grad_outputs = tuple(draw.normal(dtype=draw.exact) for _ in range(count))
    elif op == "adaln_block":
        tensors = {"h": draw.normal(*row_shape), "cond": draw.normal(*row_shape), **draw.block(width)}
        options, grad_outputs = {}, (draw.normal(*row_shape),)
    elif op == "upsample_modulate":
        block = draw.block(width)
        tensors = {"h": draw.normal(*row_shape), "tokens": draw.normal(token_count, token_width), **up}
        tensors |= {name: block[name] for name in signatures.OPS[op].names if name in block}
        options, grad_outputs = {}, (draw.normal(*row_shape), draw.normal(*row_shape))
    else:
        tensors = {"image": draw.normal(*image_shape, dtype=other_dtype or draw.exact)}
        from_tokens = op.endswith("_from_tokens")
        tensors |= (
            {"tokens": draw.normal(token_count, token_width)} if from_tokens else {"cond": draw.normal(*row_shape)}
        )
        options, grad_outputs = {"patch_size": patch_size}, (draw.normal(*image_shape),)
        if op in ONE_PASS:
            tensors |= {"target": draw.normal(*image_shape, dtype=other_dtype or draw.exact)}
            options |= {"frequency_scale": 0.7}
            total = draw.normal(dtype=draw.exact)
            grad_outputs = (total, torch.zeros_like(total), torch.zeros_like(total))
        if from_tokens:
            tensors |= up
        tensors |= draw.decoder(width, depth, pixels, channels)
        if op in ONE_PASS:
            tensors |= draw.loss_weights(batch)
        if query is not None:
            tensors |= draw.query(query, token_count, pixels, width)
        options |= {"head_norm": head_norm}
    return Inputs(op, tensors, options, grad_outputs)


def with_equal_rows(inputs: Inputs, offset: float, deviation: float = 0.0, seed: int = 0) -> Inputs:
    """The same call with nearly equal channels in every row of LayerNorm: c (1 + deviation N(0, 1)), one c per row.

    c is uniform between `offset` and 2 * `offset`; for offset 0 the rows are deviation N(0, 1). The rows are h, or the
    pixel_table of a decoder with an image of zeros and zero gates, so that all blocks and the head get them. Not for
    the losses.
    """
    tensors = {name: tensor for name, tensor in inputs.tensors.items() if tensor is not None}
    name = "h" if "h" in tensors else "pixel_table"
    rows = tensors[name]
    generator = torch.Generator().manual_seed(seed)
    common = offset * (1 + torch.rand((*rows.shape[:-1], 1), generator=generator, dtype=torch.float64))
    spread = deviation * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    tensors[name] = (common * (1 + spread) if offset else spread).to(rows)
    if name == "pixel_table":
        tensors["image"] = torch.zeros_like(tensors["image"])
        for parameter in ("mod_weight", "mod_bias"):
            tensors[parameter] = tensors[parameter].clone()
            tensors[parameter][:, 2 * rows.shape[-1] :] = 0
    return inputs._replace(tensors={**tensors})


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

    def query(self, kind: str, tokens: int, pixels: int, width: int) -> dict[str, torch.Tensor]:
        if kind == "given":
            return {"query": self.normal(tokens, pixels, width)}
        return {
            "query_tokens": self.normal(tokens, QUERY_WIDTH),
            "query_weight": self.weight(pixels * width, QUERY_WIDTH),
            "query_bias": self.bias(pixels * width),
        }

    def loss_weights(self, batch: int) -> dict[str, torch.Tensor]:
        return {
            "frequency_weight": self.normal(3, 8, 8, dtype=self.exact).abs() + 0.1,
            "sample_weight": self.normal(batch, dtype=self.exact).abs() + 0.1,
        }

    def decoder(self, width: int, depth: int, pixels: int, channels: int) -> dict[str, torch.Tensor]:
        return {
            "pixel_weight": self.weight(width, channels),
            "pixel_table": self.normal(pixels, width, dtype=self.weight_dtype),
            **self.block(width, depth),
            "head_weight": self.weight(channels, width),
            "head_bias": self.bias(channels),
        }


def rescaled(inputs: Inputs, seed: int) -> Inputs:
    """The same call with each tensor times a factor from 0.9 to 1.1: other rounding errors of the same size."""
    generator = torch.Generator().manual_seed(seed)
    return inputs._replace(
        tensors={name: None if t is None else scale_factor(generator) * t for name, t in inputs.tensors.items()},
        grad_outputs=tuple(scale_factor(generator) * gradient for gradient in inputs.grad_outputs),
    )


def scale_factor(generator: torch.Generator) -> float:
    """Random, uniform from 0.9 to 1.1."""
    return 0.9 + 0.2 * torch.rand((), generator=generator).item()


def in_float64(inputs: Inputs) -> Inputs:
    """The same call with all tensors converted to float64."""
    return inputs._replace(
        tensors={name: None if t is None else t.double() for name, t in inputs.tensors.items()},
        grad_outputs=tuple(gradient.double() for gradient in inputs.grad_outputs),
    )
