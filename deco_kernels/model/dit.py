"""The Diffusion Transformer on patches (the trunk) and the plain DiT baseline built on it.

Source: DeCo (arXiv 2511.19365), section 3.1; Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels.model.arguments import require_sizes, require_tensors
from deco_kernels.model.patches import from_patches, to_patches
from deco_kernels.model.position import pair_rotation, rotary_angles, rotate_pairs
from deco_kernels.model.pretrained import PretrainedModel

TIME_FEATURES = 256


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; statistics in float32, result in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Softmax self-attention with RMS-normalized queries and keys and an optional 2-D rotary embedding.

    x [B, L, Z] → [B, L, Z], with the rotation of the patches, float32 [L, Z/heads/2, 2] (`pair_rotation`). `qkv` has no
    bias; its rows are all of q, then k, then v. `proj` has a bias.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
        return self.attend(*self.queries_keys_values(x, rotation))

    def queries_keys_values(
        self, x: torch.Tensor, rotation: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of x, each [B, heads, L, Z/heads], normalized and rotated.

        Queries and keys pass through every step in float32, as one tensor (compiled on a GPU, two), and are rounded
        once.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, L, 3, heads, Z/heads]
        weight = torch.stack((self.q_norm.weight, self.k_norm.weight))
        if torch.compiler.is_compiling() and qkv.is_cuda:  # one kernel; as one tensor they would pass through four
            q, k = (self._normalized(qkv[:, :, i], weight[i], rotation) for i in range(2))
        else:
            q, k = self._normalized(qkv[:, :, :2], weight[:, None], rotation).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    def _normalized(self, x: torch.Tensor, weight: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """x [B, L, ..., heads, Z/heads] normalized, times weight [..., Z/heads], and rotated."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # A weight per head, so that its gradient is first summed over adjacent dimensions, which is fast.
        weight = weight.expand(*weight.shape[:-2], self.heads, -1)
        wide = F.rms_norm(wide, wide.shape[-1:], eps=self.q_norm.eps) * weight
        if rotation is not None:
            per_patch = rotation.view(-1, *[1] * (x.dim() - 3), *rotation.shape[-2:])
            wide = rotate_pairs(wide, per_patch.to(wide.dtype))
        return wide.to(x.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Softmax attention and projection: q [B, heads, L, Z/heads] → [B, L, Z]."""
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class JoinedRows(nn.Module):
    """Several linears of one input as one matmul, for inference; empty until `join`.

    x [..., in] → one [..., out] per linear, or () if empty. The parameters of the linears become views of one tensor:
    memory does not grow, and changes in place are seen. Copied, pickled or moved, it is empty again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = 0
        self.rows: tuple[torch.Tensor, torch.Tensor | None] | None = None  # weight and bias of all linears

    def join(self, linears: Sequence[nn.Module]) -> None:
        """Join linears that are plain and have parameters of their own, of the same sizes, dtypes and devices.

        For other linears nothing changes.
        """
        plain = [linear for linear in linears if isinstance(linear, nn.Linear) and _is_plain(linear)]
        parameters = [list(linear.parameters()) for linear in plain]
        kinds = {tuple((p.shape, p.dtype, p.device) for p in own) for own in parameters}
        distinct = {p for own in parameters for p in own}
        if len(plain) < len(linears) or len(kinds) != 1 or len(distinct) < sum(map(len, parameters)):
            return
        self.parts = len(plain)
        self.rows = _joined(plain, "weight"), None if plain[0].bias is None else _joined(plain, "bias")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.rows is None:
            return ()
        return F.linear(x, *self.rows).unflatten(-1, (self.parts, -1)).unbind(-2)

    def _apply(self, *arguments: Any) -> JoinedRows:
        self.rows = None
        return super()._apply(*arguments)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[type[JoinedRows], tuple[()]]:
        return JoinedRows, ()


def _joined(linears: Sequence[nn.Linear], name: str) -> torch.Tensor:
    """The parameters of this name in one tensor, whose views replace them."""
    joined = torch.cat([getattr(linear, name).detach() for linear in linears])
    for linear, part in zip(linears, joined.chunk(len(linears)), strict=True):
        setattr(linear, name, nn.Parameter(part, requires_grad=False))
    return joined


def _is_plain(linear: nn.Linear) -> bool:
    """No subclass, of the linear or of its parameters, no hooks, and no other forward."""
    altered = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(linear) is nn.Linear and not altered and all(type(p) is nn.Parameter for p in linear.parameters())


class SwiGLU(nn.Module):
    """w2·(SiLU(w1·x) · w3·x) on x [..., width], without biases; `hidden` rows in w1 and w3."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.input_rows = JoinedRows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.input_rows(x) or (self.w1(x), self.w3(x))
        return self.w2(F.silu(gate) * up)


class TimeEmbedding(nn.Module):
    """Time t [B] in [0, 1] → [B, Z]: 256 features cos‖sin(t·10^(-i/128)), i = 0..127, then Linear, SiLU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(TIME_FEATURES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = TIME_FEATURES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angle = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * 10.0**-exponent
        features = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


class Block(nn.Module):
    """One transformer block with adaptive RMS norms, x [B, L, Z] and condition c [B, Z].

    `attn` maps (x, *context) and `mlp` maps x, each [B, L, Z] → [B, L, Z]. The context is the rotation and any other
    input of the attention.

    shift₁, scale₁, gate₁, shift₂, scale₂, gate₂ = modulation(c);
    x += gate₁·attn(norm1(x)(1 + scale₁) + shift₁); x += gate₂·mlp(norm2(x)(1 + scale₂) + shift₂).
    """

    def __init__(self, width: int, attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = attn
        self.norm2 = RMSNorm(width)
        self.mlp = mlp
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, *context: Any, modulation: torch.Tensor | None = None
    ) -> torch.Tensor:
        """modulation: the result [B, 6Z] of `modulation`(c), if it has been computed before."""
        modulation = self.modulation(c) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), *context))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class PatchTransformer(nn.Module):
    """Base class of the trunks: patch and time embedding, image blocks, rotary positions.

    A subclass adds the embedding of its condition and `blocks`, then calls `reset_parameters`. Its `forward` calls
    `transform`.
    """

    blocks: nn.ModuleList

    def __init__(
        self, *, width: int, depth: int, heads: int, patch_size: int, channels: int, mlp_width: int | None, **sizes: int
    ):
        super().__init__()
        require_sizes(width=width, depth=depth, heads=heads, patch_size=patch_size, channels=channels, **sizes)
        if mlp_width is not None:
            require_sizes(mlp_width=mlp_width)
        if width % heads or (width // heads) % 4:
            raise ValueError(
                f"heads: expected width / heads to be a multiple of 4, got width {width} and heads {heads}; "
                "change one of the two"
            )
        self.width, self.heads = width, heads
        self.patch_size, self.channels = patch_size, channels
        self.patch_embed = nn.Linear(channels * patch_size**2, width)
        self.time_embed = TimeEmbedding(width)
        self.modulation_rows = JoinedRows()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters in place.

        Patch embedding Xavier-uniform, time weights N(0, 0.02²), condition embedding by `reset_condition`, everything
        else PyTorch's defaults.
        """
        reset_by_default(self.blocks)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        self.reset_condition()
        for linear in (self.time_embed.fc1, self.time_embed.fc2):
            linear.reset_parameters()
            nn.init.normal_(linear.weight, std=0.02)

    def reset_condition(self) -> None:
        """Initialize the embedding of the condition in place."""
        raise NotImplementedError

    def check_image(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Raise TypeError or ValueError unless x [B, C, H, W] and t [B] fit the model and each other."""
        require_tensors(x=x, t=t)
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x: expected images [B, {self.channels}, H, W], got shape {tuple(x.shape)}; add the batch to a single "
                "image with x[None]"
            )
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size or not x.shape[2] or not x.shape[3]:
            raise ValueError(
                f"x: expected height and width to be positive multiples of the patch size {self.patch_size}, got "
                f"{x.shape[2]}x{x.shape[3]}; crop or pad the image"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t: expected shape ({x.shape[0]},) like the batch of x, got {tuple(t.shape)}; pass one time per "
                "image, such as t.expand(len(x))"
            )
        if not x.is_floating_point() or not t.is_floating_point():
            raise TypeError(
                f"x and t: expected floating-point tensors, got {x.dtype} and {t.dtype}; convert 8-bit images: "
                "x.float() / 127.5 - 1"
            )

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block in place with `torch.compile(**options)`, one block at a time.

        Blocks of one kind share the compiled code, so compile time does not grow with depth. Parameters and state_dict
        do not change; results change only by rounding. Copies of the model are not compiled.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**options)

    def join_linears(self) -> None:
        """Compute linears of the same input in one matmul, in place, for inference.

        These are the modulations of all image blocks, which at batch 1 are a quarter of the weights that a call reads,
        and the two inputs of each SwiGLU. Results change only by rounding. The parameters of these linears have no
        gradients any more and must not be replaced, only changed in place; state_dict does not change. Linears with
        hooks stay separate; hooks that are registered later are not called, and modules put in place of joined linears
        or of blocks are not used.
        """
        blocks: list[Any] = list(self.blocks)
        if all(isinstance(block, Block) for block in blocks):
            self.modulation_rows.join([block.modulation for block in blocks])
        for module in self.modules():
            if isinstance(module, SwiGLU):
                module.input_rows.join([module.w1, module.w3])

    def rotary_angles(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Rotary angles for a grid of patches, float32 [rows·columns, Z/heads/2]."""
        return rotary_angles(rows, columns, self.width // self.heads, device)

    def transform(
        self, x: torch.Tensor, c: torch.Tensor, *context: torch.Tensor, features_after: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the patches of x [B, C, H, W] through the image blocks with condition c [B, Z] and further context.

        Returns:
            (tokens [B, L, Z] in row-major patch order; the tokens after block `features_after`, counted from 1, or
            None). Raises ValueError if there is no such block.
        """
        if features_after is not None and not 1 <= features_after <= len(self.blocks):
            raise ValueError(
                f"features_after: expected a block from 1 to {len(self.blocks)}, got {features_after}; "
                "choose one of them"
            )
        patches = to_patches(x, self.patch_size).flatten(2)
        tokens = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        rotation = pair_rotation(self.rotary_angles(*grid, x.device))
        features = None
        modulations = [{"modulation": modulation} for modulation in self.modulation_rows(c)] or [{}] * len(self.blocks)
        for number, (block, given) in enumerate(zip(self.blocks, modulations, strict=True), start=1):
            tokens = block(tokens, c, rotation, *context, **given)
            if number == features_after:
                features = tokens
        return tokens, features


def reset_by_default(modules: nn.Module) -> None:
    """Reset every linear to PyTorch's default initialization and the weight of every RMSNorm to 1."""
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class Trunk(PatchTransformer):
    """Class-conditional transformer on patches.

    Args:
        width: Z, token width.
        depth: number of blocks.
        heads: number of attention heads; Z/heads must be a multiple of 4.
        num_classes: number of classes. The label table has one more row for the null class, at index `num_classes`.
        patch_size: edge of a patch in pixels.
        channels: image channels.
        mlp_width: hidden width of the SwiGLU, int(8·Z/3) by default.

    Raises TypeError or ValueError for invalid arguments.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        patch_size: int,
        channels: int = 3,
        mlp_width: int | None = None,
    ):
        image = dict(patch_size=patch_size, channels=channels)
        super().__init__(width=width, depth=depth, heads=heads, mlp_width=mlp_width, num_classes=num_classes, **image)
        hidden = int(2 * 4 * width / 3) if mlp_width is None else mlp_width
        self.num_classes = num_classes
        self.label_table = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, Attention(width, heads), SwiGLU(width, hidden)) for _ in range(depth))
        self.reset_parameters()

    def reset_condition(self) -> None:
        """Initialize the label table from N(0, 0.02²)."""
        nn.init.normal_(self.label_table.weight, std=0.02)

    def check_inputs(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        """Raise TypeError or ValueError unless x [B, C, H, W], t [B] and labels y [B] fit the model and each other."""
        self.check_image(x, t)
        require_tensors(y=y)
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"y: expected shape ({x.shape[0]},) like the batch of x, got {tuple(y.shape)}; pass one label per image"
            )
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"y: expected int64 or int32 labels, got {y.dtype}; convert them with .long()")

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, features_after: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the trunk on x [B, C, H, W], t [B] and labels y [B] from 0 to num_classes (the null class).

        Raises TypeError or ValueError for arguments that do not fit. Labels out of range raise ValueError on the CPU.
        On a GPU, where a check would synchronize with the device, and inside torch.compile, PyTorch's own assertion
        fails instead.

        Returns:
            (tokens [B, L, Z] in row-major patch order, time embedding [B, Z], condition c = SiLU(time + label) [B, Z],
            and the tokens after block `features_after`, counted from 1, or None).
        """
        self.check_inputs(x, t, y)
        time = self.time_embed(t)
        c = F.silu(time + self._embed_labels(y))
        tokens, features = self.transform(x, c, features_after=features_after)
        return tokens, time, c, features

    def check_labels(self, y: torch.Tensor) -> None:
        """Raise ValueError unless all labels y [B] are from 0 to num_classes; checks where `forward` does."""
        if y.is_cpu and y.numel() and not torch.compiler.is_compiling() and (y.min() < 0 or y.max() > self.num_classes):
            raise self._out_of_range(y)

    def _embed_labels(self, y: torch.Tensor) -> torch.Tensor:
        try:
            return self.label_table(y)
        except IndexError:  # the lookup on the CPU checks every label
            raise self._out_of_range(y) from None

    def _out_of_range(self, y: torch.Tensor) -> ValueError:
        return ValueError(
            f"y: expected labels from 0 to {self.num_classes} (the null class), got labels from {y.min().item()} "
            f"to {y.max().item()}; the model has {self.num_classes} classes"
        )


class DiT(PretrainedModel):
    """The plain DiT baseline: the trunk, then LayerNorm without affine, modulation and one linear per patch.

    Takes and checks the arguments of `Trunk`; `config` holds them.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        patch_size: int = 16,
        channels: int = 3,
        mlp_width: int | None = None,
    ):
        super().__init__()
        self.config = dict(
            width=width,
            depth=depth,
            heads=heads,
            num_classes=num_classes,
            patch_size=patch_size,
            channels=channels,
            mlp_width=mlp_width,
        )
        self.trunk = Trunk(**self.config)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, channels * patch_size**2)
        self.reset_parameters()

    @property
    def null_label(self) -> int:
        """Label of the null class."""
        return self.trunk.num_classes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters in place; modulation and head are zero, so a new model returns exactly 0."""
        self.trunk.reset_parameters()
        for linear in (self.modulation, self.head):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def check_labels(self, y: torch.Tensor) -> None:
        """Raise ValueError for labels out of range, see `Trunk.check_labels`."""
        self.trunk.check_labels(y)

    def compile_trunk(self, **options: Any) -> None:
        """Compile the trunk's blocks in place with torch.compile, see `PatchTransformer.compile_blocks`."""
        self.trunk.compile_blocks(**options)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, features_after: int | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Predict the velocity [B, C, H, W] of a noised image x [B, C, H, W] at times t [B] in [0, 1] for labels y [B].

        Labels run from 0 to num_classes (the null class). Errors as in `Trunk.forward`. With `features_after`, returns
        the pair (velocity, tokens [B, L, Z] after that trunk block, counted from 1).
        """
        tokens, _, c, features = self.trunk(x, t, y, features_after)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        patches = self.head(normed * (1 + scale) + shift)
        patches = patches.unflatten(-1, (self.trunk.channels, -1))
        velocity = from_patches(patches, self.trunk.patch_size, *x.shape[-2:])
        return velocity if features_after is None else (velocity, features)
