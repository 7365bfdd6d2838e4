"""The fused forwards of `x_embedder` and `dec_net` in a swapped model.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from deco_kernels import ops
from deco_kernels.integrations.structure import DecoderParts, is_sharded
from deco_kernels.model.pixel_decoder import Losses, TrainingLoss, fold_query

Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Pixels [T, P, C] and tokens [T, Z] → what `dec_net` returns, [T, P, C]."""


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """Context without gradients for calls of a model inside the caller's own.

    Autocast keeps no casts of weights meanwhile: PyTorch 2.9 would use them, which have no gradients, in the caller's.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


class CurrentCall(threading.local):
    """What a call of the model leaves for its decoder, one per thread; copies and pickles start without."""

    decoder: Decode | None = None
    """Takes the place of the decoder."""
    cond: torch.Tensor | None = None
    """The condition that `y_embedder_x` received."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (CurrentCall, ())


class FusedForward:
    """The forwards of `x_embedder` and `dec_net` after the swap.

    Holds modules, not tensors, so that `.to()`, `load_state_dict`, FSDP and deep copies take effect. Every call checks
    that no module has been replaced, as adapters do: the replacement would have no effect.
    """

    def __init__(self, parts: DecoderParts, save_memory: bool, backend: str | None):
        self.parts, self.save_memory, self.backend = parts, save_memory, backend
        self.places = [place for root, top in parts.tops.items() for place in _places(root, top)]
        self.call = CurrentCall()

    @contextlib.contextmanager
    def decoding_by(self, other: Decode) -> Iterator[None]:
        """`dec_net` returns other(pixels, tokens) in place of the velocity, in this thread."""
        self.call.decoder = other
        try:
            yield
        finally:
            self.call.decoder = None

    @contextlib.contextmanager
    def without_decoder(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """`dec_net` returns its pixels; (pixels, tokens) of every call are appended to the yielded list."""
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []

        def record(pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            calls.append((pixels, tokens))
            return pixels

        with self.decoding_by(record):
            yield calls

    def forwards(self) -> dict[str, Callable[..., torch.Tensor]]:
        """The forwards that take the place of those of `parts.tops`."""
        return {"x_embedder": self.embed, "dec_net": self.decode}

    def features(self, cond: torch.Tensor) -> torch.Tensor:
        """The map of features of a decoder that has one; that of DeCo has none."""
        raise NotImplementedError

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `x_embedder`: returns the pixels [T, P, C] unchanged."""
        return pixels

    def decode(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Replaces the forward of `dec_net`: pixels [T, P, C] and tokens [T, Z] → velocity [T, P, C].

        Raises TypeError for sharded weights and ValueError for a wrong number of pixels per patch or a module that was
        replaced after the swap; the ops check the rest.
        """
        self.check(pixels)
        if self.call.decoder is not None:
            return self.call.decoder(pixels, tokens)
        p, up = self.parts.patch_size, self.parts.up
        images = pixels.transpose(1, 2).unflatten(2, (p, p))
        weights = (up.weight, up.bias, *self.weights())
        options: dict[str, Any] = dict(patch_size=p, eps=self.parts.eps, backend=self.backend)
        velocity = ops.pixel_decoder_from_tokens(images, tokens, *weights, save_memory=self.save_memory, **options)
        return velocity.flatten(2).transpose(1, 2)

    def losses(self, image: torch.Tensor, tokens: torch.Tensor, loss: TrainingLoss) -> Losses:
        """(total, pixel, frequency) of the velocity of an image [B, 3, H, W] and the tokens [T, Z] of its patches."""
        up = self.parts.up
        tensors = (image, tokens, loss.target, up.weight, up.bias, *self.weights(), loss.frequency_weight)
        options: dict[str, Any] = dict(patch_size=self.parts.patch_size, eps=self.parts.eps)
        options |= dict(frequency_scale=loss.frequency_scale, backend=self.backend or loss.backend)
        return ops.pixel_decoder_loss_from_tokens(*tensors, **options)

    def check(self, pixels: torch.Tensor) -> None:
        parts = self.parts
        for path, owner, name, child in self.places:
            if getattr(owner, name, None) is not child:
                raise ValueError(
                    f"{path}: expected the module that was there when the decoder was swapped, got another one; undo "
                    "the swap before replacing modules of the decoder"
                )
        if any(is_sharded(tensor) for module in parts.with_parameters() for tensor in module.parameters()):
            raise TypeError(
                "dec_net: expected whole weights, got DTensors; with fully_shard make dec_net one unit and leave "
                "x_embedder in the enclosing unit"
            )
        p = parts.patch_size
        if pixels.dim() != 3 or pixels.shape[1] != p * p:
            raise ValueError(
                f"dec_net: expected the pixels [tokens, {p * p}, channels] that x_embedder returns after the swap, "
                f"got shape {list(pixels.shape)}; pass them to dec_net unchanged"
            )

    def weights(self) -> tuple[torch.Tensor, ...]:
        """The weights of `pixel_decoder` from pixel_weight on: input linears folded, blocks stacked."""
        parts = self.parts
        embed, project, head = parts.embed, parts.input, parts.head
        positions = parts.x_embedder.fused_positions
        assert isinstance(positions, torch.Tensor)
        query = fold_query(self.embed_weight(), embed.bias, project.weight, project.bias, positions)
        stacked = [
            torch.stack([getattr(module, kind) for module in modules])
            for modules in (parts.norms, parts.mods, parts.fc1s, parts.fc2s)
            for kind in ("weight", "bias")
        ]
        return (*query, *stacked, self.head_weight(), head.bias)

    def embed_weight(self) -> torch.Tensor:
        """The columns of the embedder's weight for pixel and position."""
        return self.parts.embed.weight

    def head_weight(self) -> torch.Tensor:
        return self.parts.head.weight


def refuse_odd_size(error: RuntimeError, fused: FusedForward, inputs: Iterable[object]) -> None:
    """Raise ValueError in place of an error of the model's forward if its image is not whole patches.

    The image is the first of `inputs` of four dimensions. A forward that pads the image itself raises none.
    """
    p = fused.parts.patch_size
    shape = next((x.shape for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4), None)
    if type(error) is RuntimeError and shape is not None and (shape[2] % p or shape[3] % p):
        raise ValueError(
            f"x: expected an image [B, C, H, W] with H and W multiples of {p}, the patch size, got {list(shape)}; crop "
            f"or pad the image. The error of the model's forward: {error}"
        ) from error


def remove_methods(model: nn.Module, owner: type, *names: str) -> None:
    """Remove those of the model's own attributes `names` that are methods of an `owner`."""
    for name in names:
        if isinstance(getattr(vars(model).get(name), "__self__", None), owner):
            delattr(model, name)


def _places(root: str, top: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(path, parent, name in the parent, module) of each module below `top`."""
    for path, owner in top.named_modules(prefix=root):
        for name, child in owner.named_children():
            yield f"{path}.{name}", owner, name, child
