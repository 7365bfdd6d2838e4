"""The per-pixel decoder as a module: parameters, initialization and the choice of fused op.

Source: DeCo (arXiv 2511.19365), section 3.2; decoder patch and "add" interaction are ablations of its Table 4. Features
of a second token and the RMS head: CoD-Lite (arXiv 2604.12525).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels import ops
from deco_kernels.backends.arguments import HEAD_NORMS
from deco_kernels.model.arguments import require_sizes, require_tensors
from deco_kernels.model.patches import from_patches, to_patches
from deco_kernels.model.position import NUM_POSITION_FEATURES, pixel_position_features
from deco_kernels.ops.registry import check_backend_name
from deco_kernels.signatures import OPS

INTERACTIONS = ("adaln", "add")
_STORED_WEIGHTS = OPS["pixel_decoder"].names[4:-1]  # those after pixel_weight and pixel_table, without query


def fold_query(
    embed_weight: torch.Tensor,
    embed_bias: torch.Tensor,
    input_weight: torch.Tensor,
    input_bias: torch.Tensor,
    position_features: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the two input linears into one linear of a pixel's channels and a table over the patch's pixels.

    pixel_weight = input_weight·embed_weight[:, :C]; pixel_table = input_weight·(embed_weight[:, C:]·pos_k +
    embed_bias) + input_bias. Differentiable; unaffected by autocast.

    Args:
        embed_weight, embed_bias: [D, C + F], [D].
        input_weight, input_bias: [D, D], [D].
        position_features: [P, F].

    Returns:
        (pixel_weight [D, C], pixel_table [P, D]) in float32, or in the dtype of the weights if that is wider.
    """
    dtype = torch.promote_types(embed_weight.dtype, torch.float32)
    channels = embed_weight.shape[1] - position_features.shape[1]
    with _autocast_off(embed_weight):
        input_weight, embed_weight = input_weight.to(dtype), embed_weight.to(dtype)
        pixel_part, position_part = embed_weight.split((channels, position_features.shape[1]), dim=1)
        embedded = F.linear(position_features.to(dtype), position_part, embed_bias.to(dtype))
        return input_weight @ pixel_part, F.linear(embedded, input_weight, input_bias.to(dtype))


def fold_query_features(
    feature_weight: torch.Tensor, feature_bias: torch.Tensor, embed_weight: torch.Tensor, input_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the map from a query token to its pixels' features and the two input linears into one linear.

    With W_f = input_weight·embed_weight and feature_weight_k the rows of pixel k:
    query_weight_k = W_f·feature_weight_k, query_bias_k = W_f·feature_bias_k. Differentiable; unaffected by autocast.

    Args:
        feature_weight, feature_bias: [F·P, Zq], [F·P]; row f·P + k makes feature f of pixel k.
        embed_weight: [D, F], the columns of the features.
        input_weight: [D, D].

    Returns:
        (query_weight [P·D, Zq], query_bias [P·D]), row k·D + d, in float32 or in the dtype of the weights if wider.
    """
    dtype = torch.promote_types(embed_weight.dtype, torch.float32)
    with _autocast_off(embed_weight):
        features = input_weight.to(dtype) @ embed_weight.to(dtype)
        by_feature = (features.shape[1], -1)
        rows = feature_weight.to(dtype).unflatten(0, by_feature).transpose(0, 1)  # [P, F, Zq]
        weight = torch.bmm(features.expand(len(rows), -1, -1), rows)  # reads the rows where they are
        bias = feature_bias.to(dtype).unflatten(0, by_feature).T @ features.T
        return weight.flatten(0, 1), bias.flatten()


def fold_head_norm(head_weight: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """The weight of the head's norm as a factor of the head's columns: W_out·(g·norm(h)) = (W_out·diag(g))·norm(h).

    head_weight: [C, D]. norm_weight: [D]. Returns [C, D] in float32, or in the dtype of head_weight if that is wider.
    """
    dtype = torch.promote_types(head_weight.dtype, torch.float32)
    return head_weight.to(dtype) * norm_weight.to(dtype)


def _autocast_off(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Context without autocast on the tensor's device; autocast does not support "meta"."""
    kind = tensor.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def upsample(tokens: torch.Tensor, up_weight: torch.Tensor, up_bias: torch.Tensor, width: int) -> torch.Tensor:
    """Tokens [..., Z] → pixel conditions [..., P, D], D = width, in the dtype of tokens or autocast's."""
    cond = F.linear(tokens, up_weight.to(tokens.dtype), up_bias.to(tokens.dtype))
    return cond.unflatten(-1, (-1, width))


@dataclass(frozen=True)
class TrainingLoss:
    """The loss that a decoder computes in place of its velocity, see `ops.pixel_decoder_loss_from_tokens`.

    target: [B, 3, H, W]. frequency_weight: [3, 8, 8]. backend: that of the op if the decoder names none.
    """

    target: torch.Tensor
    frequency_weight: torch.Tensor
    frequency_scale: float = 1.0
    backend: str | None = None


Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(total, pixel, frequency), scalars; only total has gradients."""


def awaits_output(module: nn.Module) -> bool:
    """Whether hooks on the module read its output or the gradient of it; those of torch.distributed take any output."""
    kinds = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    found = [hook for hooks in kinds for hook in hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in found)


def other_backend(decoder: str | None, loss: str | None) -> str | None:
    """Why one op cannot serve both if decoder and loss name different backends."""
    if decoder is None or loss is None or decoder == loss:
        return None
    return f"its decoder uses backend {decoder!r}, the loss {loss!r}"


class PixelDecoder(nn.Module):
    """Decodes a noised image to a velocity, pixel by pixel, conditioned on one token per patch.

    For pixel k of the patch that belongs to token s, with position features pos_k:

        y = up_weight·s + up_bias                                           (token → pixel upsample, [T, P, D])
        h = input_weight·(embed_weight·[pixel; pos_k] + embed_bias) + input_bias
        N times: shift, scale, gate = mod_weight·SiLU(y) + mod_bias
                 h = h + gate·(fc2·SiLU(fc1·(LayerNorm(h)·(1 + scale) + shift)))
        velocity = head_weight·LayerNorm(h) + head_bias

    With `query_width`, embed_weight also takes F features f_k = feature_weight_k·u + feature_bias_k, between pixel and
    position, of a second token u [Zq] per patch. With `head_norm="rms"` the head is
    head_weight·(h/sqrt(mean(h²) + eps)·head_norm_weight) + head_bias.

    Every call folds the two input linears into pixel_weight [D, C] and pixel_table [P, D], the map of the features into
    query_weight [P·D, Zq] and query_bias [P·D], and head_norm_weight into head_weight (float32, autocast off).
    Gradients are those of the unfolded linears. With `interaction="add"`, y is added to the first h and the blocks have
    no modulation; this variant is plain PyTorch.

    Args:
        token_width: Z, token width.
        width: D, decoder width.
        depth: N, number of blocks, at least 1.
        patch_size: p, edge in image pixels of the patch of one token.
        channels: C, image channels.
        decoder_patch: r. The decoder works on positions of r×r pixels (pixel_unshuffle before, pixel_shuffle after): it
            sees C·r² channels and patches of (p/r)² positions. 1 in all published models.
        interaction: "adaln" or "add".
        position_features: "class" or "text", see `pixel_position_features`.
        query_width: Zq, width of the query tokens, or None for a decoder without them.
        query_features: F, features per pixel from a query token.
        head_norm: "layer", or "rms" for RMSNorm with a weight.
        save_memory: whether the backward computes the upsampled y [T, P, D], and on a GPU the activations of the
            blocks, again in training, in place of keeping them.
        eps: epsilon of both layer norms.
        backend: backend of the ops; None for the automatic choice.

    Raises:
        TypeError, ValueError: invalid arguments. A size that the backend does not support raises at the call.

    Parameters are float32 and stacked over blocks: norm_weight and norm_bias [N, D], mod_weight [N, 3D, D] (shift,
    scale, gate), mod_bias [N, 3D], fc1 and fc2 weights [N, D, D] and biases [N, D], head_weight [C, D], head_bias [C],
    up_weight [P·D, Z] (row k·D + d), up_bias [P·D], embed_weight [D, C + 64], embed_bias [D], input_weight [D, D],
    input_bias [D]. With `query_width` embed_weight is [D, C + F + 64], and there are feature_weight [F·P, Zq] (row
    f·P + k) and feature_bias [F·P]; with head_norm "rms" there is head_norm_weight [D]. For decoder_patch r, C·r² and
    (p/r)² take the place of C and P.
    """

    def __init__(
        self,
        token_width: int,
        *,
        width: int = 32,
        depth: int = 3,
        patch_size: int = 16,
        channels: int = 3,
        decoder_patch: int = 1,
        interaction: str = "adaln",
        position_features: str = "class",
        query_width: int | None = None,
        query_features: int = 32,
        head_norm: str = "layer",
        save_memory: bool = False,
        eps: float = 1e-6,
        backend: str | None = None,
    ):
        super().__init__()
        sizes = dict(token_width=token_width, width=width, depth=depth, patch_size=patch_size, channels=channels)
        require_sizes(**sizes, decoder_patch=decoder_patch)
        if patch_size % decoder_patch:
            raise ValueError(
                f"decoder_patch: expected a divisor of patch_size {patch_size}, got {decoder_patch}; "
                "choose one, such as 1"
            )
        if interaction not in INTERACTIONS:
            raise ValueError(
                f"interaction: expected one of {list(INTERACTIONS)}, got {interaction!r}; choose one of them"
            )
        if head_norm not in HEAD_NORMS:
            raise ValueError(f"head_norm: expected one of {list(HEAD_NORMS)}, got {head_norm!r}; choose one of them")
        if query_width is not None:
            require_sizes(query_width=query_width, query_features=query_features)
        published = interaction == "adaln" and decoder_patch == 1
        if not published and (query_width is not None or head_norm != "layer"):
            raise ValueError(
                "query_width, head_norm: expected None and 'layer' for a decoder with decoder_patch > 1 or interaction "
                f"'add', got {query_width} and {head_norm!r}; leave both out"
            )
        if not isinstance(save_memory, bool):
            raise TypeError(f"save_memory: expected True or False, got {save_memory!r}; pass one of them")
        if backend is not None:
            check_backend_name(backend)
        self.token_width, self.width, self.depth = token_width, width, depth
        self.patch_size, self.channels, self.decoder_patch = patch_size, channels, decoder_patch
        self.interaction, self.position_kind = interaction, position_features
        self.save_memory, self.eps, self.backend = save_memory, eps, backend
        self.query_width, self.query_features, self.head_norm = query_width, query_features, head_norm
        self.grid = patch_size // decoder_patch
        self.position_channels = channels * decoder_patch**2

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        positions = self.grid**2
        features = 0 if query_width is None else query_features
        self.embed_weight = parameter(width, self.position_channels + features + NUM_POSITION_FEATURES)
        self.embed_bias = parameter(width)
        self.input_weight = parameter(width, width)
        self.input_bias = parameter(width)
        self.up_weight = parameter(positions * width, token_width)
        self.up_bias = parameter(positions * width)
        self.norm_weight = parameter(depth, width)
        self.norm_bias = parameter(depth, width)
        if interaction == "adaln":
            self.mod_weight = parameter(depth, 3 * width, width)
            self.mod_bias = parameter(depth, 3 * width)
        self.fc1_weight = parameter(depth, width, width)
        self.fc1_bias = parameter(depth, width)
        self.fc2_weight = parameter(depth, width, width)
        self.fc2_bias = parameter(depth, width)
        self.head_weight = parameter(self.position_channels, width)
        self.head_bias = parameter(self.position_channels)
        if query_width is not None:
            self.feature_weight = parameter(features * positions, query_width)
            self.feature_bias = parameter(features * positions)
        if head_norm == "rms":
            self.head_norm_weight = parameter(width)
        self.register_buffer("position_features", None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize in place: linears Xavier-uniform with zero bias, except modulation and head, which are zero.

        A newly initialized decoder returns exactly 0. Also recomputes the fixed position features, so that a module
        materialized from the meta device is complete after this call.
        """
        self.fill_position_features()
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("norm_weight", "head_norm_weight"):
                nn.init.ones_(parameter)
            elif name.endswith("_bias") or name in ("mod_weight", "head_weight"):
                nn.init.zeros_(parameter)
            else:
                for matrix in parameter.unbind() if parameter.dim() == 3 else (parameter,):
                    nn.init.xavier_uniform_(matrix)

    def fill_position_features(self) -> None:
        """Compute the fixed position features, float32 [P, 64], on the device of the parameters."""
        self.position_features = pixel_position_features(self.grid, self.position_kind, self.embed_weight.device)

    def fold_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the two input linears: (pixel_weight [D, C·r²], pixel_table [P, D]), see `fold_query`."""
        embed_weight: torch.Tensor = self.embed_weight
        if self.query_width is not None:
            pixel, _, position = self._embed_parts()
            embed_weight = torch.cat((pixel, position), dim=1)
        query = (embed_weight, self.embed_bias, self.input_weight, self.input_bias)
        return fold_query(*query, self.position_features)

    def fold_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the map of the query tokens: (query_weight [P·D, Zq], query_bias [P·D]), see `fold_query_features`."""
        _, features, _ = self._embed_parts()
        return fold_query_features(self.feature_weight, self.feature_bias, features, self.input_weight)

    def _embed_parts(self) -> tuple[torch.Tensor, ...]:
        """The columns of embed_weight for the pixel, the features and the position."""
        sizes = (self.position_channels, self.query_features, NUM_POSITION_FEATURES)
        return self.embed_weight.split(sizes, dim=1)

    def folded_weights(self) -> tuple[torch.Tensor, ...]:
        """The weights of `ops.pixel_decoder`."""
        stored = [getattr(self, name) for name in _STORED_WEIGHTS]
        if self.head_norm == "rms":
            head = _STORED_WEIGHTS.index("head_weight")
            stored[head] = fold_head_norm(stored[head], self.head_norm_weight)
        return (*self.fold_input(), *stored)

    def unfused_reason(self, backend: str | None = None) -> str | None:
        """Why the losses of this backend cannot take the place of the velocity; None if `forward` takes a
        `TrainingLoss` and no hook on the module awaits the velocity."""
        if self.interaction != "adaln" or self.decoder_patch != 1:
            return f"its decoder has interaction {self.interaction!r} and decoder_patch {self.decoder_patch}"
        if self.query_width is not None:
            return "its decoder takes query tokens"
        if self.channels != 3:
            return f"its decoder has {self.channels} channels, not 3"
        if type(self).forward is not PixelDecoder.forward or "forward" in vars(self):
            return "the forward of its decoder has been replaced"
        if awaits_output(self):
            return "a hook on its decoder awaits the velocity"
        return other_backend(self.backend, backend)

    def forward(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        loss: TrainingLoss | None = None,
        query_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor | Losses:
        """Decode a noised image to the velocity, or to the losses of the velocity.

        Args:
            image: noised image [B, C, H, W], any floating dtype and strides; H and W divisible by patch_size.
            tokens: [..., Z], whose leading sizes multiply to B·(H/p)·(W/p), with patches in row-major order.
            loss: asks for the losses, for 3 channels, interaction "adaln" and decoder patch 1.
            query_tokens: [..., Zq], leading sizes and dtype as tokens, for a decoder with `query_width`.

        Returns:
            Velocity [B, C, H, W] in the activation dtype (that of tokens, or autocast's); with `loss`, the float32
            scalars (total, pixel, frequency), of which only total has gradients.

        Raises:
            TypeError: arguments that are not tensors, or a `loss` of another type.
            ValueError: shapes that do not fit the decoder or each other, or `loss` for another decoder.
            BackendUnavailable: `backend` cannot run these tensors.
        """
        self._check_inputs(image, tokens, query_tokens)
        if not isinstance(loss, (TrainingLoss, type(None))):
            raise TypeError(f"loss: expected a TrainingLoss or None, got {type(loss).__name__}; pass one of them")
        if loss is not None and (self.interaction == "add" or self.decoder_patch > 1):
            raise ValueError(
                "loss: expected None for a decoder with decoder_patch > 1 or interaction 'add', got a TrainingLoss; "
                "compute the loss of the velocity with ops.flow_matching_loss"
            )
        if self.decoder_patch > 1:
            image = F.pixel_unshuffle(image, self.decoder_patch)
        if self.interaction == "add":
            pixel_weight, pixel_table = self.fold_input()
            cond = upsample(tokens, self.up_weight, self.up_bias, self.width)
            velocity = self._decode_by_addition(image, cond, pixel_weight, pixel_table)
        else:
            parameters = (self.up_weight, self.up_bias, *self.folded_weights())
            options: dict[str, Any] = dict(
                patch_size=self.grid, head_norm=self.head_norm, eps=self.eps, backend=self.backend
            )
            if query_tokens is not None:
                query_weight, query_bias = self.fold_features()
                options |= dict(query_tokens=query_tokens, query_weight=query_weight, query_bias=query_bias)
            if loss is not None:
                tensors = (image, tokens, loss.target, *parameters, loss.frequency_weight)
                options |= dict(frequency_scale=loss.frequency_scale, backend=self.backend or loss.backend)
                return ops.pixel_decoder_loss_from_tokens(*tensors, **options)
            options["save_memory"] = self.save_memory
            velocity = ops.pixel_decoder_from_tokens(image, tokens, *parameters, **options)
        return F.pixel_shuffle(velocity, self.decoder_patch) if self.decoder_patch > 1 else velocity

    def _check_inputs(self, image: torch.Tensor, tokens: torch.Tensor, query_tokens: torch.Tensor | None) -> None:
        require_tensors(image=image, tokens=tokens)
        p = self.patch_size
        if image.dim() != 4 or image.shape[1] != self.channels or image.shape[2] % p or image.shape[3] % p:
            raise ValueError(
                f"image: expected [B, {self.channels}, H, W] with H and W multiples of {p}, got {tuple(image.shape)}; "
                "crop or pad the image, or check its channels"
            )
        count = image.shape[0] * (image.shape[2] // p) * (image.shape[3] // p)
        if tokens.shape[-1:] != (self.token_width,) or tokens.shape[:-1].numel() != count:
            raise ValueError(
                f"tokens: expected [..., {self.token_width}] with {count} tokens, one per patch of the image, got "
                f"{tuple(tokens.shape)}; check patch_size {p} and the image's size"
            )
        if (query_tokens is None) != (self.query_width is None):
            expected = "None" if self.query_width is None else f"[..., {self.query_width}]"
            found = "None" if query_tokens is None else "a tensor"
            raise ValueError(
                f"query_tokens: expected {expected} for a decoder with query_width={self.query_width}, got {found}; "
                f"pass {expected}"
            )
        if query_tokens is not None:
            require_tensors(query_tokens=query_tokens)
            if query_tokens.shape != (*tokens.shape[:-1], self.query_width):
                raise ValueError(
                    f"query_tokens: expected {(*tokens.shape[:-1], self.query_width)}, leading sizes as tokens, got "
                    f"{tuple(query_tokens.shape)}; pass one row per token"
                )

    def _decode_by_addition(
        self, image: torch.Tensor, cond: torch.Tensor, pixel_weight: torch.Tensor, pixel_table: torch.Tensor
    ) -> torch.Tensor:
        """The "add" interaction: h = input + cond, then blocks h + fc2·SiLU(fc1·LayerNorm(h)), residual in float32."""
        residual_dtype, dtype = pixel_table.dtype, cond.dtype
        pixels = to_patches(image, self.grid).transpose(-1, -2)
        cond = cond.reshape(*pixels.shape[:-1], self.width)

        def normalize(
            h: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            weight, bias = (None if p is None else p.to(residual_dtype) for p in (weight, bias))
            return F.layer_norm(h, (self.width,), weight, bias, self.eps).to(dtype)

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

        h = linear(pixels.to(dtype), pixel_weight).to(residual_dtype) + pixel_table + cond
        for i in range(self.depth):
            hidden = F.silu(
                linear(normalize(h, self.norm_weight[i], self.norm_bias[i]), self.fc1_weight[i], self.fc1_bias[i])
            )
            h = h + linear(hidden, self.fc2_weight[i], self.fc2_bias[i])
        velocity = linear(normalize(h), self.head_weight, self.head_bias)
        return from_patches(velocity.transpose(-1, -2), self.grid, *image.shape[-2:])

    def extra_repr(self) -> str:
        return (
            f"token_width={self.token_width}, width={self.width}, depth={self.depth}, patch_size={self.patch_size}, "
            f"channels={self.channels}, decoder_patch={self.decoder_patch}, interaction={self.interaction!r}, "
            f"query_width={self.query_width}, head_norm={self.head_norm!r}"
        )
