"""Finds the parts of a published per-pixel decoder in a model and verifies that they compute the published formula.

Source: the module structure of the published DeCo models (arXiv 2511.19365, section 3), and of CoD-Lite (arXiv
2604.12525) and Mage-VAE (arXiv 2607.19064), whose decoders have `y_embedder_x` and a `final_layer` of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import nn

# Classes of compiled or wrapped modules. Compared by name, because importing them is slow.
_WRAPPERS = {
    "OptimizedModule": "torch.compile",
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DDP",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP",
    "ScriptModule": "torch.jit",
}
SAME = 1e-4
"""Relative L2 difference allowed in float32 between a model's own function and the fused formula."""
_ON_CPU: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
_COPIED_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


Kind = TypeVar("Kind", bound=nn.Module)


DECO, COD_LITE, MAGE_VAE = "DeCo", "CoD-Lite", "Mage-VAE"
TOPS = ("x_embedder", "dec_net")
"""Modules whose forward a swap replaces."""
TOPS_WITH_FEATURES = ("y_embedder_x", "final_layer")
"""The others in CoD-Lite and Mage-VAE."""
_HOLDERS = ("pipeline", "decoder_model")  # names of the decoder's model in Mage-VAE: in checkpoints, in the code


class Decoder(Protocol):
    """Pixels [T, P, C] and tokens [T, Z] → velocity [T, P, C]; the features of a condition [B, Zq, h, w] first."""

    def features(self, cond: torch.Tensor) -> torch.Tensor: ...

    def decode(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor: ...


@dataclass
class DecoderParts:
    """The modules of a published decoder by role, and their sizes."""

    x_embedder: nn.Module
    dec_net: nn.Module
    embed: nn.Linear  # C + F → D, or C + D + F → D with features of a condition
    up: nn.Linear  # Z → P·D
    input: nn.Linear  # D → D
    norms: list[nn.LayerNorm]
    mods: list[nn.Linear]  # D → 3D
    fc1s: list[nn.Linear]
    fc2s: list[nn.Linear]
    head: nn.Linear  # D → C
    patch_size: int
    eps: float
    structure: str = DECO
    feature_map: nn.Conv2d | None = None  # Zq → D·P, without DeCo's
    final_layer: nn.Module | None = None  # of its own, without DeCo's
    head_norm: nn.Module | None = None  # RMSNorm with a weight, without DeCo's

    @property
    def tops(self) -> dict[str, nn.Module]:
        """The modules by name whose forward a swap replaces."""
        found: dict[str, nn.Module] = dict(zip(TOPS, (self.x_embedder, self.dec_net), strict=True))
        if self.feature_map is not None and self.final_layer is not None:
            found |= zip(TOPS_WITH_FEATURES, (self.feature_map, self.final_layer), strict=True)
        return found

    @property
    def inputs(self) -> int:
        """Channels that x_embedder receives per pixel."""
        return self.channels + (0 if self.feature_map is None else self.input.in_features)

    @property
    def channels(self) -> int:
        return self.head.out_features

    def with_parameters(self) -> list[nn.Module]:
        """The modules that hold the decoder's parameters."""
        linears = [self.embed, self.up, self.input, self.head, *self.mods, *self.fc1s, *self.fc2s]
        others = [module for module in (self.feature_map, self.head_norm) if module is not None]
        return [*linears, *self.norms, *others]


def require_unwrapped(model: nn.Module) -> None:
    """Raise TypeError unless the model and its decoder are modules that are not compiled, wrapped or sharded."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    _require_bare("model", model)
    for root in (*TOPS, *TOPS_WITH_FEATURES):
        part = getattr(model, root, None)
        for name, module in part.named_modules(prefix=root) if isinstance(part, nn.Module) else ():
            _require_bare(name, module)


def _require_bare(name: str, module: nn.Module) -> None:
    found = next((_WRAPPERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
    if found is None and getattr(module, "_compiled_call_impl", None) is not None:
        found = "torch.compile"
    if found is None and any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
        found = "FSDP or tensor parallelism"
    if found is not None:
        raise TypeError(
            f"{name}: expected a bare module, got a {type(module).__name__} that {found} has wrapped or compiled; call "
            "swap_decoder on the model first, then compile or wrap it"
        )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Compares the name, because importing the class is slow."""
    return type(tensor).__name__ == "DTensor"


def holder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module whose attributes are the parts of the decoder, and which of the three structures it seems to have."""
    if not isinstance(getattr(model, "dec_net", None), nn.Module):
        for name in _HOLDERS:
            holder = getattr(model, name, None)
            if isinstance(getattr(holder, "dec_net", None), nn.Module):
                assert isinstance(holder, nn.Module)
                return holder, MAGE_VAE
    return model, COD_LITE if hasattr(model, "y_embedder_x") else DECO


def find_parts(model: nn.Module, structure: str) -> DecoderParts:
    """The parts of the decoder. Raises ValueError that names the first difference from the structure."""
    x_embedder = _child(model, "model", "x_embedder")
    dec_net = _child(model, "model", "dec_net")
    up = _linear(dec_net, "dec_net", "cond_embed")
    project = _linear(dec_net, "dec_net", "input_proj")
    width = project.in_features
    _require_sizes("dec_net.input_proj", project, width, width)
    patch_size = math.isqrt(up.out_features // width)
    if up.out_features != patch_size**2 * width:
        _differs("dec_net.cond_embed", f"p·p·{width} outputs for some patch size p", str(up.out_features))
    blocks = [block_parts(block, f"dec_net.res_blocks[{i}]", width) for i, block in enumerate(_blocks(dec_net))]
    norms, mods, fc1s, fc2s = (list(modules) for modules in zip(*blocks, strict=True))
    head, head_norm, eps = _final_layer(dec_net, width) if structure == DECO else _rms_final_layer(model, width)
    for number, norm in enumerate(norms):
        if norm.eps != eps:
            _differs(f"dec_net.res_blocks[{number}].in_ln", f"eps {eps} as in final_layer", str(norm.eps))
    embed = _embedder(x_embedder)
    inputs = head.out_features + (0 if structure == DECO else width)
    if embed.out_features != width or embed.in_features <= inputs:
        expected = f"from {inputs} channels and the position features to {width}"
        _differs("x_embedder.embedder", expected, f"{embed.in_features} to {embed.out_features}")
    parts = DecoderParts(x_embedder, dec_net, embed, up, project, norms, mods, fc1s, fc2s, head, patch_size, eps)
    if structure != DECO:
        parts.structure, parts.head_norm = structure, head_norm
        parts.feature_map = _feature_map(model, width * patch_size**2)
        parts.final_layer = _child(model, "model", "final_layer")
    _require_nothing_else(parts)
    return parts


def _feature_map(model: nn.Module, outputs: int) -> nn.Conv2d:
    conv = _require_plain("y_embedder_x", _child(model, "model", "y_embedder_x"), nn.Conv2d)
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
    if not plain or conv.out_channels != outputs or conv.bias is None:
        _differs("y_embedder_x", f"a 1x1 convolution with bias to {outputs} channels", str(conv))
    return conv


def _embedder(x_embedder: nn.Module) -> nn.Linear:
    embedder = _child(x_embedder, "x_embedder", "embedder")
    if isinstance(embedder, nn.Sequential):
        (linear,) = _linears(embedder, "x_embedder.embedder", (nn.Linear,))
        return linear
    return _linear(x_embedder, "x_embedder", "embedder")


def _blocks(dec_net: nn.Module) -> list[nn.Module]:
    blocks = _child(dec_net, "dec_net", "res_blocks")
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        _differs("dec_net.res_blocks", "a list of at least one block", f"{type(blocks).__name__}")
    return list(blocks)


def block_parts(block: nn.Module, path: str, width: int) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear, nn.Linear]:
    """The norm, the modulation and the two MLP linears of a block."""
    norm = _require_norm(f"{path}.in_ln", _child(block, path, "in_ln"), width, affine=True)
    fc1, fc2 = _linears(_child(block, path, "mlp"), f"{path}.mlp", (nn.Linear, nn.SiLU, nn.Linear))
    _require_sizes(f"{path}.mlp[0]", fc1, width, width)
    _require_sizes(f"{path}.mlp[2]", fc2, width, width)
    modulation = _child(block, path, "adaLN_modulation")
    (mod,) = _linears(modulation, f"{path}.adaLN_modulation", (nn.SiLU, nn.Linear))
    _require_sizes(f"{path}.adaLN_modulation[1]", mod, width, 3 * width)
    return norm, mod, fc1, fc2


def _final_layer(dec_net: nn.Module, width: int) -> tuple[nn.Linear, nn.Module, float]:
    """The head, the norm before it and its eps."""
    layer = _child(dec_net, "dec_net", "final_layer")
    head, path, norm = _norm_and_head(layer, "dec_net.final_layer", width)
    return head, norm, _require_norm(path, norm, width, affine=False).eps


def _rms_final_layer(model: nn.Module, width: int) -> tuple[nn.Linear, nn.Module, float]:
    """The same of a final layer outside `dec_net`, with an RMSNorm."""
    if isinstance(getattr(model.get_submodule("dec_net"), "final_layer", None), nn.Module):
        _differs("dec_net.final_layer", "a final_layer outside dec_net", "one inside")
    head, path, norm = _norm_and_head(_child(model, "model", "final_layer"), "final_layer", width)
    tensors = {name: list(tensor.shape) for name, tensor in norm.named_parameters()}
    if isinstance(norm, nn.LayerNorm) or tensors != {"weight": [width]}:
        _differs(path, f"an RMSNorm with a weight [{width}]", f"{type(norm).__name__} with {tensors}")
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, name)), None)
    if not isinstance(eps, float):
        _differs(path, "an attribute eps", str(eps))
    return head, norm, eps


def _norm_and_head(layer: nn.Module, path: str, width: int) -> tuple[nn.Linear, str, nn.Module]:
    """The head of a final layer, and the path and module of its norm."""
    head = _linear(layer, path, "linear")
    _require_sizes(f"{path}.linear", head, width, head.out_features)
    norms = [(name, module) for name, module in layer.named_children() if module is not head]
    if len(norms) != 1:
        _differs(path, "a norm and a linear", ", ".join(name for name, _ in layer.named_children()))
    return head, f"{path}.{norms[0][0]}", norms[0][1]


def _require_nothing_else(parts: DecoderParts) -> None:
    """Raise ValueError for parameters or persistent buffers beyond those of the parts, or on the meta device."""
    known = {id(tensor) for module in parts.with_parameters() for tensor in module.parameters()}
    for root, top in parts.tops.items():
        for name, tensor in top.state_dict(prefix=f"{root}.", keep_vars=True).items():
            if id(tensor) not in known:
                _differs(name, "nothing of this name", f"a tensor of shape {list(tensor.shape)}")
    if any(p.is_meta for top in parts.tops.values() for p in top.parameters()):
        raise ValueError(
            "model: expected parameters with values, got some on the meta device; call to_empty and initialize or load "
            "them before swap_decoder"
        )


def _child(parent: nn.Module, path: str, name: str) -> nn.Module:
    child = getattr(parent, name, None)
    full = name if path == "model" else f"{path}.{name}"
    if not isinstance(child, nn.Module):
        _differs(full, "a module", "none of this name" if child is None else type(child).__name__)
    if "forward" in vars(child):
        _differs(full, "a module that runs the forward of its class", "one whose forward has been replaced")
    return child


def _linear(parent: nn.Module, path: str, name: str) -> nn.Linear:
    return _require_plain(f"{path}.{name}", _child(parent, path, name), nn.Linear)


def _linears(module: nn.Module, path: str, kinds: Sequence[type[nn.Module]]) -> list[nn.Linear]:
    """The linear modules of a Sequential of these kinds."""
    expected = "Sequential of " + ", ".join(kind.__name__ for kind in kinds)
    if not isinstance(module, nn.Sequential):
        _differs(path, expected, type(module).__name__)
    if len(module) != len(kinds):
        _differs(path, expected, "Sequential of " + ", ".join(type(part).__name__ for part in module))
    for number, (part, kind) in enumerate(zip(module, kinds, strict=True)):
        _require_plain(f"{path}[{number}]", part, kind)
    return [part for part in module if isinstance(part, nn.Linear)]


def _require_plain(path: str, module: nn.Module, kind: type[Kind]) -> Kind:
    """Raise ValueError unless the module is of the given class with its forward; a linear must have a bias, and may
    have a forward of its own, which `require_same_function` compares.

    Its weights are parameters or parametrizations, which are computed at every read. A weight that a forward hook
    computes, as in the older `nn.utils.weight_norm`, would be stale, because the module's forward no longer runs.
    """
    own_forward = kind is not nn.Linear and type(module).forward is not getattr(kind, "forward", None)
    if not isinstance(module, kind) or own_forward or "forward" in vars(module):
        _differs(path, kind.__name__, type(module).__name__)
    if kind is nn.Linear and module.bias is None:
        _differs(path, "Linear with bias", "Linear without bias")
    for name in ("weight", "bias"):
        if isinstance(vars(module).get(name), torch.Tensor):
            own = ", ".join(each for each, _ in module.named_parameters() if each.startswith(f"{name}_"))
            _differs(f"{path}.{name}", "a parameter", f"a tensor that a hook computes from {own}")
    return module


def _require_sizes(path: str, linear: nn.Linear, inputs: int, outputs: int) -> None:
    if (linear.in_features, linear.out_features) != (inputs, outputs):
        _differs(path, f"Linear from {inputs} to {outputs}", f"{linear.in_features} to {linear.out_features}")


def _require_norm(path: str, module: nn.Module, width: int, affine: bool) -> nn.LayerNorm:
    norm = _require_plain(path, module, nn.LayerNorm)
    if tuple(norm.normalized_shape) != (width,):
        _differs(path, f"LayerNorm over {width}", f"over {list(norm.normalized_shape)}")
    if (norm.weight is not None) != affine or (norm.bias is not None) != affine:
        wanted = "with weight and bias" if affine else "without weight and bias"
        _differs(path, f"LayerNorm {wanted}", "LayerNorm with other parameters")
    return norm


def _differs(path: str, expected: str, found: str) -> NoReturn:
    raise ValueError(
        f"model: {path} differs from the published structure: expected {expected}, got {found}; only models whose "
        "decoder is built like the published one can be swapped"
    )


# --- function of the parts --------------------------------------------------------------------------------------------


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def position_features(parts: DecoderParts) -> torch.Tensor:
    """The position features [P, F] that `x_embedder` appends to the pixels' channels, float32 on its device.

    Read from the input of its linear for black pixels; raises ValueError if that is not [1, P, C + F].
    """
    copied = _copy(parts)
    received = []
    handle = copied.embed.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    black = torch.zeros(1, parts.patch_size**2, parts.inputs, **_ON_CPU)
    _run("x_embedder", copied.x_embedder, black)
    handle.remove()
    shape = (1, parts.patch_size**2, parts.embed.in_features)
    if len(received) != 1 or tuple(received[0].shape) != shape:
        _differs("x_embedder", f"one call of its linear on {list(shape)}", f"{[list(r.shape) for r in received]}")
    return received[0][0, :, parts.inputs :].float().to(parts.embed.weight.device)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def require_same_function(parts: DecoderParts, fused_forward: Callable[[DecoderParts], Decoder]) -> None:
    """Raise ValueError unless the modules' own forward, in training and evaluation mode, agrees with the fused one.

    Compares them on random weights and inputs, on one copy on the CPU in float32. The model's own weights would not do:
    at initialization most of the decoder is multiplied by zero.
    """
    copied = _copy(parts)
    generator = torch.Generator("cpu").manual_seed(0)
    for module in copied.tops.values():
        randomize(module, generator)
    pixels = torch.randn(2, parts.patch_size**2, parts.channels, generator=generator, **_ON_CPU)
    tokens = torch.randn(2, parts.up.in_features, generator=generator, **_ON_CPU)
    forward, cond = fused_forward(copied), None
    if copied.feature_map is not None:
        cond = torch.randn(1, copied.feature_map.in_channels, 1, 2, generator=generator, **_ON_CPU)
        forward.features(cond)
    fused = forward.decode(pixels, tokens)
    for mode in ("training", "evaluation"):
        for module in copied.tops.values():
            module.train(mode == "training")
        with torch.random.fork_rng(devices=()):  # for dropout
            own = _own_velocity(copied, pixels, tokens, cond)
        if not isinstance(own, torch.Tensor) or own.shape != fused.shape:
            found = str(list(getattr(own, "shape", [type(own).__name__])))
            _differs("dec_net", f"to return {list(fused.shape)}", found)
        difference = ((own.double() - fused.double()).norm() / fused.double().norm()).item()
        if not difference <= SAME:
            found = f"a relative difference of {difference:.2g} on random weights in {mode} mode"
            _differs("dec_net", "the published formula", found)


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Random parameters in place: matrices N(0, 1/fan-in), vectors N(0, 0.09), around 1 for the weights of norms."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, **_ON_CPU)
        scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(noise * scale + (1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0))


def _own_velocity(parts: DecoderParts, pixels: torch.Tensor, tokens: torch.Tensor, cond: torch.Tensor | None) -> Any:
    """What the modules' own forwards give for pixels [T, P, C], tokens [T, Z] and a condition [1, Zq, 1, T]."""
    if parts.feature_map is None or parts.final_layer is None:
        return _run("dec_net", parts.dec_net, _run("x_embedder", parts.x_embedder, pixels), tokens)
    features = _run("y_embedder_x", parts.feature_map, cond)  # [1, F·P, 1, T]
    by_pixel = features[0, :, 0].unflatten(0, (-1, pixels.shape[1])).permute(2, 1, 0)
    embedded = _run("x_embedder", parts.x_embedder, torch.cat((pixels, by_pixel), dim=-1))
    return _run("final_layer", parts.final_layer, _run("dec_net", parts.dec_net, embedded, tokens))


def _run(name: str, module: nn.Module, *inputs: Any) -> Any:
    try:
        return module(*inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        _differs(name, f"to run on {shapes}", f"{type(error).__name__}: {error}")


def _copy(parts: DecoderParts) -> DecoderParts:
    """A copy of the parts and their modules on the CPU in float32, without hooks."""
    memo: dict[int, object] = {}
    for top in parts.tops.values():
        for module in top.modules():
            memo |= {id(hooks): type(hooks)() for kind in _COPIED_HOOKS if (hooks := getattr(module, kind)) is not None}
    copied = copy.deepcopy(parts, memo)
    for top in copied.tops.values():
        top.to(**_ON_CPU)
    return copied
