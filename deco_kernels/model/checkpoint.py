"""Conversion between published checkpoints and models.

Source: the parameter names and shapes of the published DeCo checkpoints (arXiv 2511.19365).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from deco_kernels.model.deco import DeCo, PixelDiffusion
from deco_kernels.model.dit import DiT
from deco_kernels.model.position import NUM_POSITION_FEATURES
from deco_kernels.model.presets import Model
from deco_kernels.model.text_to_image import DeCoTextToImage

# Accepted dtypes of parameters; they must be dense.
_KINDS = ("float64", "float32", "bfloat16", "float16")

# Prefixes in a published file: the raw weights, their exponential moving average, the head of the alignment loss.
RAW, EMA, ALIGNMENT_HEAD = "denoiser.", "ema_denoiser.", "diffusion_trainer.proj."

# Published name → name here; {i} is the block number. Here the trunk has a module per block, the decoder stacked
# tensors.
_ANY_BLOCK = {
    **{name: name for name in ("norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight")},
    **{name: name for name in ("attn.proj.weight", "attn.proj.bias")},
    "adaLN_modulation.0.weight": "modulation.weight",
    "adaLN_modulation.0.bias": "modulation.bias",
}
_CLASS_BLOCK = {
    **_ANY_BLOCK,
    **{name: name for name in ("attn.qkv.weight", "mlp.w1.weight", "mlp.w3.weight", "mlp.w2.weight")},
}
_PACKED_MLP = {"mlp.w12.weight": "mlp.w13.weight", "mlp.w3.weight": "mlp.w2.weight"}
_TEXT_BLOCK = {**_ANY_BLOCK, **_PACKED_MLP, "attn.qkv.weight": "attn.qkv.weight"}
_IMAGE_BLOCK = {
    **_ANY_BLOCK,
    **_PACKED_MLP,
    "attn.qkv_x.weight": "attn.qkv.weight",
    "attn.kv_y.weight": "attn.text_kv.weight",
}


def _numbered(published: str, ours: str, names: dict[str, str]) -> dict[str, str]:
    """Prefix the names of a block's parameters with the numbered names of the blocks."""
    return {f"{published}.{{i}}.{theirs}": f"{ours}.{{i}}.{name}" for theirs, name in names.items()}


_TIME = {
    "t_embedder.mlp.0.weight": "trunk.time_embed.fc1.weight",
    "t_embedder.mlp.0.bias": "trunk.time_embed.fc1.bias",
    "t_embedder.mlp.2.weight": "trunk.time_embed.fc2.weight",
    "t_embedder.mlp.2.bias": "trunk.time_embed.fc2.bias",
}
_CLASS_TRUNK = {
    **_TIME,
    "y_embedder.embedding_table.weight": "trunk.label_table.weight",
    **_numbered("blocks", "trunk.blocks", _CLASS_BLOCK),
}
_TEXT_TRUNK = {
    **_TIME,
    "y_embedder.proj.weight": "trunk.text_embed.weight",
    "y_embedder.proj.bias": "trunk.text_embed.bias",
    "y_embedder.norm.weight": "trunk.text_norm.weight",
    "y_pos_embedding": "trunk.text_position",
    **_numbered("text_refine_blocks", "trunk.text_blocks", _TEXT_BLOCK),
    **_numbered("blocks", "trunk.blocks", _IMAGE_BLOCK),
}
_PATCHES = {
    "s_embedder.proj.weight": "trunk.patch_embed.weight",
    "s_embedder.proj.bias": "trunk.patch_embed.bias",
}
_DECODER = {
    "x_embedder.embedder.0.weight": "decoder.embed_weight",
    "x_embedder.embedder.0.bias": "decoder.embed_bias",
    "dec_net.cond_embed.weight": "decoder.up_weight",
    "dec_net.cond_embed.bias": "decoder.up_bias",
    "dec_net.input_proj.weight": "decoder.input_weight",
    "dec_net.input_proj.bias": "decoder.input_bias",
    "dec_net.final_layer.linear.weight": "decoder.head_weight",
    "dec_net.final_layer.linear.bias": "decoder.head_bias",
}
_DECODER_BLOCK = {
    f"dec_net.res_blocks.{{i}}.{module}.{kind}": f"decoder.{ours}_{kind}"
    for module, ours in {"in_ln": "norm", "adaLN_modulation.1": "mod", "mlp.0": "fc1", "mlp.2": "fc2"}.items()
    for kind in ("weight", "bias")
}


@dataclass(frozen=True)
class _Layout:
    """Published parameter names of a model class, and how its constructor arguments follow from shapes."""

    model: type[Model]
    names: dict[str, str]
    stacked: dict[str, str]
    sizes: Callable[[_Evidence], dict[str, Any]]

    def pairs(self, parameters: Container[str]) -> Iterator[tuple[str, str]]:
        """(published name, name here) of every parameter that is not stacked, for all blocks in `parameters`."""
        for name, ours in self.names.items():
            if "{i}" not in name:
                yield name, ours
                continue
            for i in count():
                if ours.format(i=i) not in parameters:
                    break
                yield name.format(i=i), ours.format(i=i)


class _Evidence:
    """Sizes inferred from the shapes in a checkpoint.

    Every key that shows a size is read and the most frequent value wins, so one missing or misshapen tensor does not
    change the result.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def size(self, what: str, *sources: tuple[str, int] | tuple[str, int, int]) -> int:
        """The size `what`, read from (key pattern, dimension[, amount to subtract]); `*` matches any block number."""
        votes: Counter[int] = Counter()
        for pattern, dim, *less in sources:
            matcher = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
            for key, shape in self.shapes.items():
                if matcher.fullmatch(key) and len(shape) > dim and shape[dim] > sum(less):
                    votes[shape[dim] - sum(less)] += 1
        if not votes:
            names = ", ".join(source[0] for source in sources)
            raise ValueError(
                f"state_dict: cannot infer the {what}: none of {names} is present with a usable shape; "
                "pass all tensors of a published model"
            )
        return votes.most_common(1)[0][0]

    def count(self, prefix: str) -> int:
        """One more than the highest block number after `prefix`."""
        matcher = re.compile(re.escape(prefix) + r"(\d+)\.")
        numbers = [int(match.group(1)) for match in map(matcher.match, self.shapes) if match]
        if not numbers:
            raise ValueError(
                f"state_dict: cannot infer the number of blocks: no key starts with {prefix}; "
                "pass all tensors of a published model"
            )
        # A number beyond the count of keys is an invalid key, not a model with that many blocks.
        return max((n for n in numbers if n < len(numbers)), default=0) + 1


def _trunk_sizes(evidence: _Evidence, *mlp_sources: tuple[str, int]) -> dict[str, Any]:
    width = evidence.size(
        "trunk width",
        ("t_embedder.mlp.2.weight", 0),
        ("t_embedder.mlp.2.bias", 0),
        ("blocks.*.norm1.weight", 0),
        ("blocks.*.attn.proj.weight", 0),
    )
    head_dim = evidence.size("head size", ("blocks.*.attn.q_norm.weight", 0), ("blocks.*.attn.k_norm.weight", 0))
    return dict(
        width=width,
        depth=evidence.count("blocks."),
        heads=max(width // head_dim, 1),
        mlp_width=evidence.size("SwiGLU width", *mlp_sources),
    )


def _class_trunk_sizes(evidence: _Evidence) -> dict[str, Any]:
    mlp_sources = (("blocks.*.mlp.w1.weight", 0), ("blocks.*.mlp.w3.weight", 0), ("blocks.*.mlp.w2.weight", 1))
    classes = evidence.size("number of classes", ("y_embedder.embedding_table.weight", 0)) - 1
    return {**_trunk_sizes(evidence, *mlp_sources), "num_classes": classes}


def _text_trunk_sizes(evidence: _Evidence) -> dict[str, Any]:
    """Sizes of a text trunk; shapes do not show the rotary mode, so it is that of the published model."""
    mlp_sources = (("blocks.*.mlp.w3.weight", 1), ("text_refine_blocks.*.mlp.w3.weight", 1))
    return dict(
        **_trunk_sizes(evidence, *mlp_sources),
        text_depth=evidence.count("text_refine_blocks."),
        text_width=evidence.size("width of the text features", ("y_embedder.proj.weight", 1)),
        text_length=evidence.size("length of the text", ("y_pos_embedding", 1)),
        rotary="published",
    )


def _dit_sizes(evidence: _Evidence) -> dict[str, Any]:
    """Sizes of a plain DiT; assumes 3 image channels, since shapes show only channels times patch area."""
    patch = evidence.size(
        "patch size", ("x_embedder.proj.weight", 1), ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0)
    )
    return {**_class_trunk_sizes(evidence), "channels": 3, "patch_size": math.isqrt(patch // 3)}


def _decoder_sizes(evidence: _Evidence) -> dict[str, Any]:
    """Sizes of a decoder as its ops see them: channels C·r² and patch size p/r for decoder patch r."""
    width = evidence.size(
        "decoder width",
        ("dec_net.input_proj.weight", 0),
        ("x_embedder.embedder.0.weight", 0),
        ("dec_net.res_blocks.*.in_ln.weight", 0),
        ("dec_net.res_blocks.*.mlp.2.weight", 0),
        ("dec_net.final_layer.linear.weight", 1),
    )
    channels = evidence.size(
        "channels",
        ("dec_net.final_layer.linear.weight", 0),
        ("dec_net.final_layer.linear.bias", 0),
        ("x_embedder.embedder.0.weight", 1, NUM_POSITION_FEATURES),
    )
    upsampled = evidence.size("patch size", ("dec_net.cond_embed.weight", 0), ("dec_net.cond_embed.bias", 0))
    return dict(
        channels=channels,
        patch_size=math.isqrt(upsampled // width),
        decoder_width=width,
        decoder_depth=evidence.count("dec_net.res_blocks."),
    )


def _deco_sizes(evidence: _Evidence) -> dict[str, Any]:
    """Sizes of a DeCo model; 3·r² decoder channels with r = 4 or 16 mean 3 image channels and decoder patch r."""
    decoder = _decoder_sizes(evidence)
    decoder_patch = {3 * r**2: r for r in (4, 16)}.get(decoder["channels"], 1)
    decoder["channels"] //= decoder_patch**2
    decoder["patch_size"] *= decoder_patch
    modulated = any(".adaLN_modulation.1." in key for key in evidence.shapes)
    return dict(
        **_class_trunk_sizes(evidence),
        **decoder,
        decoder_patch=decoder_patch,
        interaction="adaln" if modulated else "add",
    )


def _text_to_image_sizes(evidence: _Evidence) -> dict[str, Any]:
    return {**_text_trunk_sizes(evidence), **_decoder_sizes(evidence)}


_DIT = _Layout(
    model=DiT,
    names={
        "x_embedder.proj.weight": "trunk.patch_embed.weight",
        "x_embedder.proj.bias": "trunk.patch_embed.bias",
        **_CLASS_TRUNK,
        "final_layer.linear.weight": "head.weight",
        "final_layer.linear.bias": "head.bias",
        "final_layer.adaLN_modulation.0.weight": "modulation.weight",
        "final_layer.adaLN_modulation.0.bias": "modulation.bias",
    },
    stacked={},
    sizes=_dit_sizes,
)
_DECO = _Layout(
    model=DeCo,
    names={**_PATCHES, **_CLASS_TRUNK, **_DECODER},
    stacked=_DECODER_BLOCK,
    sizes=_deco_sizes,
)
_TEXT_TO_IMAGE = _Layout(
    model=DeCoTextToImage,
    names={**_PATCHES, **_TEXT_TRUNK, **_DECODER},
    stacked=_DECODER_BLOCK,
    sizes=_text_to_image_sizes,
)
_LAYOUTS = (_DECO, _TEXT_TO_IMAGE, _DIT)


def to_published(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The model's parameters under their published names, each preceded by `prefix` (such as "ema_denoiser.").

    The tensors are detached views of the parameters (slices of those that are stacked over blocks) with the same bits.
    Raises TypeError unless the model is a DeCo, DeCoTextToImage or DiT.
    """
    layout = next((known for known in _LAYOUTS if type(model) is known.model), None)
    if layout is None:
        raise TypeError(
            f"model: expected DeCo, DeCoTextToImage or DiT, got {type(model).__name__}; unwrap compiled or parallel "
            "models first"
        )
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    published = {prefix + name: parameters[ours] for name, ours in layout.pairs(parameters)}
    for name, ours in layout.stacked.items():
        for i, block in enumerate(parameters[ours].unbind() if ours in parameters else ()):
            published[prefix + name.format(i=i)] = block
    return published


def from_published(state_dict: Mapping[str, Any], *, ema: bool = True) -> Model:
    """Build the model of a published checkpoint. Its class and sizes are inferred from keys and shapes.

    Args:
        state_dict: name → tensor, or the dictionary of a whole file, which holds that mapping under "state_dict".
            Names may have no prefix or begin with "denoiser." or "ema_denoiser."; the alignment head
            ("diffusion_trainer.proj.") is skipped.
        ema: if both are present, take the averaged (EMA) weights instead of the raw ones.

    Returns:
        A DeCo, DeCoTextToImage or DiT with copies of the tensors, in their dtypes and on their devices.

    Raises:
        TypeError: not a mapping of names to dense float64, float32, bfloat16 or float16 tensors.
        ValueError: an unknown model, or missing, extra or misshapen keys; one message lists all of them.
    """
    tensors = select(state_dict, ema)
    layout, model = _fit(tensors)
    parameters = dict(model.named_parameters())
    ours = {target: tensors[name] for name, target in layout.pairs(parameters)}
    for name, target in layout.stacked.items():
        if target in parameters:
            blocks = [tensors[name.format(i=i)].detach() for i in range(len(parameters[target]))]
            if len({(block.dtype, block.device) for block in blocks}) > 1:
                raise TypeError(
                    f"state_dict: expected one dtype and device for all of {name.format(i='*')}, got a mixture; "
                    "convert all to one"
                )
            ours[target] = torch.stack(blocks)
    return fill(model, ours)


def published_model_on_meta(tensors: Mapping[str, torch.Tensor]) -> Model:
    """The model that published names without prefix and shapes describe, on the meta device.

    Raises as `from_published`.
    """
    return _fit(tensors)[1]


def from_config(name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Model:
    """The model of class `name` and constructor arguments `config`, with copies of the tensors of its `state_dict`.

    Raises ValueError for an unknown class, invalid arguments, or names or shapes that differ, and TypeError for entries
    that are not dense floating-point tensors.
    """
    return fill(config_model_on_meta(name, config, tensors), tensors)


def config_model_on_meta(name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Model:
    """The model of `from_config` on the meta device, without values. Raises as `from_config`."""
    cls = {layout.model.__name__: layout.model for layout in _LAYOUTS}.get(name)
    if cls is None:
        known = ", ".join(layout.model.__name__ for layout in _LAYOUTS)
        raise ValueError(f"model: expected one of {known}, got {name!r}; read it with the version that wrote it")
    _require_tensors(tensors)
    _require_blocks(config, tensors)
    with torch.device("meta"):
        try:
            model = cls(**config)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last two: sizes that overflow
            raise ValueError(f"config: {name} cannot be built from {dict(config)}: {error}") from None
    compare_shapes(name, _shapes(model.state_dict()), _shapes(tensors))
    return model


def _require_blocks(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if `config` has more blocks than `tensors`: construction time grows with the blocks."""
    numbered = (re.match(r"trunk\.(blocks|text_blocks)\.(\d+)\.", name) for name in tensors)
    numbers = {match.groups() for match in numbered if match}
    held = Counter(kind for kind, _ in numbers)
    stacks = (tensors[name].shape[:1].numel() for name in _DECODER_BLOCK.values() if name in tensors)
    found = {"depth": held["blocks"], "text_depth": held["text_blocks"], "decoder_depth": max(stacks, default=0)}
    for name, blocks in found.items():
        depth = config.get(name)
        if isinstance(depth, int) and depth > blocks:
            raise ValueError(
                f"config: {name}: expected {blocks}, the number of blocks with tensors, got {depth}; the config was "
                "changed, or tensors are missing; write the file again from its model"
            )


def fill(model: Model, state: Mapping[str, torch.Tensor]) -> Model:
    """Fill a model on the meta device with copies of the tensors of its `state_dict` and with its fixed buffers."""
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, strict=True, assign=True)
    if isinstance(model, PixelDiffusion):
        model.decoder.fill_position_features()
    return model


def _fit(tensors: Mapping[str, torch.Tensor]) -> tuple[_Layout, Model]:
    """The layout of these names and its model on the meta device; raises ValueError if the shapes do not fit it."""
    layout, shapes = _recognize(tensors), _shapes(tensors)
    config = layout.sizes(_Evidence(shapes))
    with torch.device("meta"):
        try:
            model = layout.model(**config)
        except ValueError as error:
            raise ValueError(f"state_dict: its shapes describe an invalid model ({config}): {error}") from None
    compare_shapes(layout.model.__name__, _shapes(to_published(model)), shapes)
    return layout, model


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def select(state_dict: Mapping[str, Any], ema: bool) -> dict[str, torch.Tensor]:
    """The tensors of one model, EMA or raw, with the prefix removed from their names."""
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}; pass one"
        )
    _require_tensors(state_dict)
    present = [prefix for prefix in (RAW, EMA) if any(name.startswith(prefix) for name in state_dict)]
    if not present:
        return dict(state_dict)
    chosen = EMA if (ema and EMA in present) or RAW not in present else RAW
    skipped = tuple(prefix for prefix in (RAW, EMA, ALIGNMENT_HEAD) if prefix != chosen)
    return {name.removeprefix(chosen): value for name, value in state_dict.items() if not name.startswith(skipped)}


def _require_tensors(state_dict: Mapping[Any, Any]) -> None:
    wrong = [
        f"{name!r} ({_kind(value)})"
        for name, value in state_dict.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor) and _kind(value) in _KINDS)
    ]
    if wrong:
        raise TypeError(
            f"state_dict: expected dense tensors of {', '.join(_KINDS)} under their names, got {', '.join(wrong)}; "
            "convert or remove them"
        )


def _kind(value: Any) -> str:
    """Description of an entry: its dtype, preceded by the layout of a sparse tensor, or its type if not a tensor."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype, layout = (str(each).removeprefix("torch.") for each in (value.dtype, value.layout))
    return dtype if value.layout is torch.strided else f"{layout} {dtype}"


def _recognize(tensors: Mapping[str, torch.Tensor]) -> _Layout:
    """The layout that the names belong to."""
    if any(name.startswith(("text_refine_blocks.", "y_pos_embedding", "y_embedder.proj.")) for name in tensors):
        return _TEXT_TO_IMAGE
    if any(name.startswith("dec_net.") for name in tensors):
        return _DECO
    if any(name.startswith(("x_embedder.proj.", "final_layer.")) for name in tensors):
        return _DIT
    some = ", ".join(sorted(tensors)[:5]) or "no keys"
    raise ValueError(
        "state_dict: expected a published DeCo (keys dec_net.*) or DiT (keys x_embedder.proj.*, final_layer.*), "
        f"got {some}; pass the weights of one of them"
    )


def compare_shapes(model: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one ValueError that lists every difference between expected and found names and shapes."""
    missing = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    extra = [f"extra: {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    misshapen = [
        f"misshapen: {name}, expected {list(shape)}, got {list(found[name])}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = missing + extra + misshapen
    if problems:
        raise ValueError(
            f"state_dict: does not fit a {model} of the sizes that its shapes show; pass its tensors, all and no "
            "others:\n  " + "\n  ".join(problems)
        )
