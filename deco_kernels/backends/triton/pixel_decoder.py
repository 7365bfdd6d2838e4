"""pixel_decoder on Triton: the per-pixel decoder in one kernel, its backward in N + 2 kernels per chunk of tokens.

    h = W_x·rgb + table[pixel] + query;  N times h = adaln_block(h, cond);  velocity = W_out·norm(h) + b_out

The query is optional, norm is LayerNorm or RMSNorm; both are compiled into the kernels (QUERY, RMS).

Forward: a persistent program iterates over tiles of `block` pixels; h and SiLU(cond) of a tile stay in registers,
weights pass through shared memory, and only the velocity is written. The image is read and the velocity written in
place, by strides. Per pixel at D 32, N 3, C 3, bfloat16: 76 bytes moved, 31 kFLOP.

Backward, per chunk of tokens (chunk_sizes.py):
    recompute_kernel    recomputes the forward, stores h before each block and runs the backward of the head
    backward_kernel     of adaln_block.py, once per block, last block first; the gradient of h stays in one buffer
    embedding_kernel    gradients of the image, pixel_weight and pixel_table
If the forward has kept h before each block and before the head, head_kernel of pixel_decoder_head.py takes the place of
recompute_kernel. The gradient of the query is that of h before the first block, which backward_kernel writes to its
place.
Per pixel at D 32, N 3, bfloat16: the kernels move 1.5 kB, of which 0.2 kB are inputs and results; about 125 kFLOP.

Every sum over pixels is owned by one program (registers, then its partial buffer), and partial buffers are added in
fixed order: results on the same device are bitwise reproducible.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from deco_kernels.backends import chunk_sizes
from deco_kernels.backends.arguments import Gradients
from deco_kernels.backends.chunks import slices
from deco_kernels.signatures import DecoderWeights, flat

from .adaln_block import block_forward, run_block_backward
from .functions import add_to, image_offsets, normalize, once, row_offsets, silu_of_double, tile_pixels
from .launching import (
    collapsed_rows,
    contiguous,
    device_guard,
    launch,
    launch_over_rows,
    math_options,
    optional,
    parameters_for,
    part_of,
    pixel_rows,
    program_limit,
    readable_image,
    weight_partials,
)
from .pixel_decoder_head import add_head_sums, head_backward, head_kernel
from .weights import PackedWeights, pack, unpack_grad

LAUNCH_TOKENS = 2**22  # tokens per forward launch, so that pixel indices fit in 32 bits

# ---------------------------------------------------------------------------------------------------------- forward


@triton.jit
def repeated_pixels(tile, n_tokens, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """`tile_pixels` whose missing pixels repeat those of the last token: a row of zeros has no norm at eps 0."""
    token, pixel, valid = tile_pixels(tile, n_tokens, PIXELS, BLOCK)
    if PIXELS < BLOCK:
        token = tl.minimum(token, n_tokens - 1)
    return token, pixel, valid


@triton.jit
def embed_pixels(
    image_ptr, offsets, stride_c, pixel, pixel_weight_ptr, pixel_table_ptr,
    query_ptr, query_token_stride, query_pixel_stride, token,
    QUERY: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """h⁰ [BLOCK, D] = W_x·rgb + table[pixel] (+ query), float32.

    ONCE (see `once`) is for kernels that need h in two register layouts, as for a store, or that spill without it.
    """
    d = tl.arange(0, D)
    h = tl.load(pixel_table_ptr + pixel[:, None] * D + d[None, :]).to(tl.float32)
    for c in tl.static_range(C):
        value = tl.load(image_ptr + offsets + c * stride_c).to(tl.float32)
        h += value[:, None] * tl.load(pixel_weight_ptr + d * C + c).to(tl.float32)[None, :]
    if QUERY:
        rows = row_offsets(token, pixel, query_token_stride, query_pixel_stride, D)
        h += tl.load(query_ptr + rows).to(tl.float32)
    if ONCE:
        h = once(h)
    return h


@triton.jit(do_not_specialize=["first_token", "n_tokens"])
def forward_kernel(
    image_ptr, image_stride_b, image_stride_c, image_stride_h, image_stride_w,  # [B, C, H, W]
    cond_ptr, cond_token_stride, cond_pixel_stride,  # [n_tokens, P, D], unit channel stride
    query_ptr, query_token_stride, query_pixel_stride,  # with QUERY: like cond; else None
    pixel_weight_ptr, pixel_table_ptr,  # [D, C], [P, D]
    matrices_ptr, biases_ptr,  # [N, 5, D, D] (in, out), [N, 5, D]: see weights.py
    head_weight_ptr, head_bias_ptr,  # [C, D], [C]
    velocity_ptr, velocity_stride_b, velocity_stride_c, velocity_stride_h, velocity_stride_w,  # out [B, C, H, W]
    states_ptr, state_stride,  # with KEEPS: out [N + 1, n_tokens, P, D]: h before each block and the head, cond's dtype
    first_token, n_tokens, tokens_y, tokens_x,  # cond row 0 is token `first_token` of the images
    KEEPS: tl.constexpr, QUERY: tl.constexpr, RMS: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Velocity of all pixels of `n_tokens` tokens."""
    PIXELS: tl.constexpr = PATCH * PATCH
    d = tl.arange(0, D)
    n_tiles = tl.cdiv(n_tokens * PIXELS, BLOCK)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        token, pixel, valid = repeated_pixels(tile, n_tokens, PIXELS, BLOCK)
        offsets = image_offsets(
            first_token + token, pixel, tokens_y, tokens_x, image_stride_b, image_stride_h, image_stride_w, PATCH
        )
        h = embed_pixels(
            image_ptr, offsets, image_stride_c, pixel, pixel_weight_ptr, pixel_table_ptr,
            query_ptr, query_token_stride, query_pixel_stride, token, QUERY, D, C, FAST_TANH and (KEEPS or D == 64),
        )  # fmt: skip
        rows = row_offsets(token, pixel, cond_token_stride, cond_pixel_stride, D)
        cond = tl.load(cond_ptr + rows).to(tl.float32)
        s = silu_of_double(0.5 * cond, FAST_TANH).to(matrices_ptr.dtype.element_ty)
        states = states_ptr + row_offsets(token, pixel, PIXELS * D, D, D)
        for block in tl.static_range(N):
            if KEEPS:
                tl.store(states, h, mask=valid[:, None])
                states += state_stride
            h = block_forward(h, s, matrices_ptr, biases_ptr, block, D, EPS, PRECISION, FAST_TANH)
        if KEEPS:
            tl.store(states, h, mask=valid[:, None])
        normalized, _ = normalize(h, D, EPS, RMS)
        offsets = image_offsets(
            first_token + token, pixel, tokens_y, tokens_x,
            velocity_stride_b, velocity_stride_h, velocity_stride_w, PATCH,
        )  # fmt: skip
        for c in tl.static_range(C):
            head = tl.load(head_weight_ptr + c * D + d).to(tl.float32)
            velocity = tl.sum(normalized * head[None, :], 1) + tl.load(head_bias_ptr + c).to(tl.float32)
            tl.store(velocity_ptr + offsets + c * velocity_stride_c, velocity, mask=valid)


def run_forward(
    image: torch.Tensor,
    cond: torch.Tensor,
    query: torch.Tensor | None,
    packed: PackedWeights,
    decoder_weights: tuple[torch.Tensor, ...],
    velocity: torch.Tensor,
    first_token: int,
    patch_size: int,
    head_norm: str,
    eps: float,
    states: torch.Tensor | None = None,
) -> None:
    """Launch forward_kernel for the tokens of cond and query [tokens, P, D], from `first_token` of the images onward.

    `states` [N + 1, tokens, P, D] receives h before each block and the head.
    """
    kept = velocity if states is None else states
    pixel_weight, pixel_table, head_weight, head_bias = decoder_weights
    tokens, pixels, _ = cond.shape
    launch_over_rows(
        forward_kernel, "pixel_decoder", tokens * pixels, cond,
        image, *image.stride(), cond, cond.stride(0), cond.stride(1), *optional(query), pixel_weight, pixel_table,
        *packed, head_weight, head_bias, velocity, *velocity.stride(), kept, kept.stride(0),
        first_token, tokens, image.shape[2] // patch_size, image.shape[3] // patch_size,
        KEEPS=states is not None, QUERY=query is not None, RMS=head_norm == "rms",
        N=packed.matrices.shape[0], C=image.shape[1], PATCH=patch_size, EPS=eps,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["first_token", "n_tokens"])
def recompute_kernel(
    image_ptr, image_stride_b, image_stride_c, image_stride_h, image_stride_w,  # [B, C, H, W]
    cond_ptr, cond_token_stride, cond_pixel_stride,  # [n_tokens, P, D], unit channel stride
    query_ptr, query_token_stride, query_pixel_stride,  # with QUERY: like cond; else None
    pixel_weight_ptr, pixel_table_ptr,  # [D, C], [P, D]
    matrices_ptr, biases_ptr,  # [N, 5, D, D] (in, out), [N, 5, D]: see weights.py
    head_weight_ptr,  # [C, D]
    grad_velocity_ptr, velocity_stride_b, velocity_stride_c, velocity_stride_h, velocity_stride_w,  # [B, C, H, W]
    states_ptr, state_stride,  # out [N, n_tokens, P, D]: h before each block, in cond's dtype
    grad_h_ptr,  # out [n_tokens, P, D]: gradient of h after the last block
    grad_head_weight_ptr, grad_head_bias_ptr,  # in and out [programs, C, D], [programs, C] float32
    first_token, n_tokens, tokens_y, tokens_x,  # cond row 0 is token `first_token` of the images
    WEIGHT_GRAD: tl.constexpr,  # whether gradients of the head are needed
    QUERY: tl.constexpr, RMS: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Recompute the forward, storing the states that the block kernels need, then run the backward of the head."""
    PIXELS: tl.constexpr = PATCH * PATCH
    grad_head_weight = tl.zeros([16, D], tl.float32)
    grad_head_bias = tl.zeros([16], tl.float32)
    n_tiles = tl.cdiv(n_tokens * PIXELS, BLOCK)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        token, pixel, valid = repeated_pixels(tile, n_tokens, PIXELS, BLOCK)
        offsets = image_offsets(
            first_token + token, pixel, tokens_y, tokens_x, image_stride_b, image_stride_h, image_stride_w, PATCH
        )
        h = embed_pixels(
            image_ptr, offsets, image_stride_c, pixel, pixel_weight_ptr, pixel_table_ptr,
            query_ptr, query_token_stride, query_pixel_stride, token, QUERY, D, C, FAST_TANH,
        )  # fmt: skip
        cond_rows = row_offsets(token, pixel, cond_token_stride, cond_pixel_stride, D)
        cond = tl.load(cond_ptr + cond_rows).to(tl.float32)
        s = silu_of_double(0.5 * cond, FAST_TANH).to(matrices_ptr.dtype.element_ty)
        rows = row_offsets(token, pixel, PIXELS * D, D, D)
        for block in tl.static_range(N):
            tl.store(states_ptr + block * state_stride + rows, h, mask=valid[:, None])
            h = block_forward(h, s, matrices_ptr, biases_ptr, block, D, EPS, PRECISION, FAST_TANH)

        offsets = image_offsets(
            first_token + token, pixel, tokens_y, tokens_x,
            velocity_stride_b, velocity_stride_h, velocity_stride_w, PATCH,
        )  # fmt: skip
        grad_head_weight, grad_head_bias = head_backward(
            h, grad_velocity_ptr, offsets, velocity_stride_c, valid, head_weight_ptr, grad_h_ptr + rows,
            grad_head_weight, grad_head_bias, WEIGHT_GRAD, D, C, BLOCK, EPS, RMS, PRECISION,
        )  # fmt: skip
    if WEIGHT_GRAD:
        add_head_sums(grad_head_weight_ptr, grad_head_bias_ptr, grad_head_weight, grad_head_bias, D, C)


@triton.jit(do_not_specialize=["first_token", "n_tokens"])
def embedding_kernel(
    grad_h_ptr,  # [n_tokens, P, D]: gradient of h before the first block
    image_ptr, image_stride_b, image_stride_c, image_stride_h, image_stride_w,  # [B, C, H, W]
    pixel_weight_ptr,  # [D, C]
    grad_image_ptr,  # out [B, C, H, W]
    grad_image_stride_b, grad_image_stride_c, grad_image_stride_h, grad_image_stride_w,
    grad_pixel_weight_ptr,  # in and out [slices, groups, C, D] float32
    grad_pixel_table_ptr,  # in and out [slices, max(P, BLOCK), D] float32
    first_token, n_tokens, tokens_y, tokens_x,
    IMAGE_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr,  # which gradients are needed
    D: tl.constexpr, C: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (group, slice) owns one group of BLOCK pixel positions in every slices-th token (or set of tokens)."""
    PIXELS: tl.constexpr = PATCH * PATCH
    GROUPS: tl.constexpr = PIXELS // BLOCK if PIXELS > BLOCK else 1
    group = tl.program_id(0)
    d = tl.arange(0, D)
    channel = tl.arange(0, 16)
    grad_table = tl.zeros([BLOCK, D], tl.float32)
    grad_weight = tl.zeros([16, D], tl.float32)
    for step in range(tl.program_id(1), tl.cdiv(n_tokens * PIXELS, GROUPS * BLOCK), tl.num_programs(1)):
        token, pixel, valid = tile_pixels(step * GROUPS + group, n_tokens, PIXELS, BLOCK)
        rows = row_offsets(token, pixel, PIXELS * D, D, D)
        grad_h = tl.load(grad_h_ptr + rows, mask=valid[:, None], other=0.0).to(tl.float32)
        if WEIGHT_GRAD:
            grad_table += grad_h
            offsets = image_offsets(
                first_token + token, pixel, tokens_y, tokens_x, image_stride_b, image_stride_h, image_stride_w, PATCH
            )
            values = tl.zeros([16, BLOCK], tl.float32)
            for c in tl.static_range(C):
                value = tl.load(image_ptr + offsets + c * image_stride_c, mask=valid, other=0.0).to(tl.float32)
                values = tl.where(channel[:, None] == c, value[None, :], values)
            operand: tl.constexpr = grad_h_ptr.dtype.element_ty
            grad_weight = tl.dot(values.to(operand), grad_h.to(operand), grad_weight, input_precision=PRECISION)
        if IMAGE_GRAD:
            offsets = image_offsets(
                first_token + token, pixel, tokens_y, tokens_x,
                grad_image_stride_b, grad_image_stride_h, grad_image_stride_w, PATCH,
            )  # fmt: skip
            for c in tl.static_range(C):
                weight = tl.load(pixel_weight_ptr + d * C + c).to(tl.float32)
                tl.store(
                    grad_image_ptr + offsets + c * grad_image_stride_c, tl.sum(grad_h * weight[None, :], 1), mask=valid
                )
    if WEIGHT_GRAD:
        row = tl.program_id(1) * (GROUPS * BLOCK) + group * BLOCK + tl.arange(0, BLOCK)
        add_to(grad_pixel_table_ptr + row[:, None] * D + d[None, :], grad_table)
        row = (tl.program_id(1) * GROUPS + group) * C + channel
        add_to(grad_pixel_weight_ptr + row[:, None] * D + d[None, :], grad_weight, mask=(channel < C)[:, None])


def query_and_head(weights: DecoderWeights) -> tuple[torch.Tensor, ...]:
    """(pixel_weight, pixel_table, head_weight, head_bias), contiguous."""
    return contiguous(weights.pixel_weight, weights.pixel_table, weights.head_weight, weights.head_bias)


class DecoderBackward:
    """Gradients of the decoder, accumulated over chunks of at most `chunk_tokens` tokens.

    Args:
        image, grad_velocity: [B, C, H, W], any strides.
        weights: weights of pixel_decoder.
        dtype: activation dtype.
        needs: whether (image, cond, any weight) need a gradient; that of the query is written where there is a place.
        grad_image: written, any strides; None: allocated.
        velocity_bytes: bytes per pixel of a chunk besides N + 1 activations.
    """

    def __init__(
        self,
        image: torch.Tensor,
        grad_velocity: torch.Tensor,
        weights: DecoderWeights,
        dtype: torch.dtype,
        patch_size: int,
        head_norm: str,
        eps: float,
        needs: tuple[bool, bool, bool],
        grad_image: torch.Tensor | None = None,
        velocity_bytes: int = 0,
    ):
        self.image, self.grad_velocity, self.weights = readable_image(image), readable_image(grad_velocity), weights
        self.dtype, self.patch_size, self.rms, self.eps = dtype, patch_size, head_norm == "rms", eps
        self.needs_image, self.needs_cond, self.needs_weights = needs
        self.pixel_weight, self.pixel_table, self.head_weight, _ = query_and_head(weights)
        self.packed = pack(weights.blocks, dtype)
        self.depth, self.width = weights.blocks.modulation.norm_weight.shape
        if grad_image is None:
            grad_image = torch.empty(image.shape, dtype=image.dtype, device=image.device)
        self.grad_image = grad_image
        device, pixels, channels = image.device, patch_size**2, image.shape[1]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.embedding = parameters_for("pixel_decoder_embedding", self.width, dtype, device)
        self.groups = max(1, pixels // self.embedding.block)
        self.slices = triton.cdiv(program_limit(device, self.embedding), self.groups)
        # Of recompute_kernel, or of head_kernel.
        programs = max(
            program_limit(device, parameters_for(kernel, self.width, dtype, device))
            for kernel in ("pixel_decoder_recompute", "pixel_decoder_head")
        )
        # The workspace of a chunk holds N + 1 activations.
        self.chunk_pixels = chunk_sizes.chunk_pixels((self.depth + 1) * self.width * dtype.itemsize + velocity_bytes)
        self.chunk_tokens = max(1, self.chunk_pixels // pixels)
        if self.needs_weights:
            self.grad_head_weight = zeros(programs, channels, self.width)
            self.grad_head_bias = zeros(programs, channels)
            self.grad_pixel_weight = zeros(self.slices, self.groups, channels, self.width)
            self.grad_pixel_table = zeros(self.slices, max(pixels, self.embedding.block), self.width)
            self.grad_matrix, self.grad_bias = weight_partials(
                "adaln_block_backward", self.packed.matrices, self.depth, 5
            )

    def add(
        self,
        cond: torch.Tensor,
        query: torch.Tensor | None,
        first_token: int,
        grad_cond: torch.Tensor,
        grad_query: torch.Tensor | None,
        activations: torch.Tensor | None = None,
    ) -> None:
        """Process the tokens of cond and query [tokens, P, D] and write their rows of grad_cond and grad_query.

        The gradients are contiguous and have the dtype of cond; grad_query is None if it is not needed. `activations`
        [N + 1, tokens, P, D]: h before each block and the head, as the forward has kept them; None: computed again.
        """
        tokens, pixels, width = cond.shape
        arrays = self.depth + 1 if activations is None else 1
        workspace = cond.new_empty(arrays, min(tokens, self.chunk_tokens), pixels, width)
        for part in slices(tokens, self.chunk_tokens):
            first, states = first_token + part.start, workspace[:, : part.stop - part.start]
            grad_h = states[-1]
            if activations is None:
                self._recompute(cond[part], part_of(query, part), first, states)
            else:
                states = activations[:, part]
                self.head(states[self.depth], grad_h, first)
            self.add_from_head(cond[part], first, grad_cond[part], part_of(grad_query, part), states, grad_h)

    def on(self, image: torch.Tensor, grad_velocity: torch.Tensor, grad_image: torch.Tensor) -> DecoderBackward:
        """The same sums, for these images."""
        part = copy.copy(self)
        part.image, part.grad_velocity, part.grad_image = image, grad_velocity, grad_image
        return part

    def add_from_head(
        self,
        cond: torch.Tensor,
        first_token: int,
        grad_cond: torch.Tensor,
        grad_query: torch.Tensor | None,
        states: torch.Tensor,
        grad_h: torch.Tensor,
    ) -> None:
        """The backward of blocks and embedding for one chunk. The last gradient of h is that of the query.

        `states` [N or more, tokens, P, D]: h before each block. `grad_h` [tokens, P, D]: the gradient of h after the
        last one, overwritten.
        """
        width = cond.shape[-1]
        grad_h_rows = grad_h.view(-1, width)
        for block in reversed(range(self.depth)):
            if block == 0 and grad_query is not None:
                grad_h = grad_query
            partials = (self.grad_matrix[:, block], self.grad_bias[:, block]) if self.needs_weights else None
            run_block_backward(
                states[block].view(-1, width), cond, grad_h_rows, self.packed.block(block), grad_h, grad_cond,
                partials, first=block == self.depth - 1, last=block == 0, cond_needed=self.needs_cond, eps=self.eps,
            )  # fmt: skip
        if self.needs_image or self.needs_weights:
            self._embedding(grad_h, first_token)

    def head(self, h: torch.Tensor, grad_h: torch.Tensor, first_token: int) -> None:
        """Write the gradient of h [tokens, P, D], the input of the head; grad_h may be h."""
        tokens, pixels, _ = h.shape
        launch_over_rows(
            head_kernel, "pixel_decoder_head", tokens * pixels, h,
            h, grad_h, self.head_weight, self.grad_velocity, *self.grad_velocity.stride(), *self.head_sums(h),
            *self.places(first_token, tokens), WEIGHT_GRAD=self.needs_weights, C=self.image.shape[1],
            PATCH=self.patch_size, EPS=self.eps, RMS=self.rms,
        )  # fmt: skip

    def head_sums(self, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per program; `unused` if no weight needs a gradient."""
        return (self.grad_head_weight, self.grad_head_bias) if self.needs_weights else (unused, unused)

    def places(self, first_token: int, tokens: int) -> tuple[int, int, int, int]:
        return first_token, tokens, self.image.shape[2] // self.patch_size, self.image.shape[3] // self.patch_size

    def _recompute(
        self, cond: torch.Tensor, query: torch.Tensor | None, first_token: int, workspace: torch.Tensor
    ) -> None:
        tokens, pixels, _ = cond.shape
        grad_h = workspace[self.depth]
        sums = self.head_sums(grad_h)
        launch_over_rows(
            recompute_kernel, "pixel_decoder_recompute", tokens * pixels, cond,
            self.image, *self.image.stride(), cond, cond.stride(0), cond.stride(1), *optional(query),
            self.pixel_weight, self.pixel_table, *self.packed, self.head_weight,
            self.grad_velocity, *self.grad_velocity.stride(), workspace, workspace.stride(0), grad_h, *sums,
            *self.places(first_token, tokens),
            WEIGHT_GRAD=self.needs_weights, QUERY=query is not None, RMS=self.rms,
            N=self.depth, C=self.image.shape[1], PATCH=self.patch_size, EPS=self.eps,
        )  # fmt: skip

    def _embedding(self, grad_h: torch.Tensor, first_token: int) -> None:
        tokens, pixels, width = grad_h.shape
        steps = triton.cdiv(tokens * pixels, self.groups * self.embedding.block)
        sums = (self.grad_pixel_weight, self.grad_pixel_table) if self.needs_weights else (grad_h, grad_h)
        launch(
            embedding_kernel, (self.groups, min(steps, self.slices)), self.embedding,
            grad_h, self.image, *self.image.stride(), self.pixel_weight,
            self.grad_image, *self.grad_image.stride(), *sums,
            *self.places(first_token, tokens), IMAGE_GRAD=self.needs_image, WEIGHT_GRAD=self.needs_weights,
            D=width, C=self.image.shape[1], PATCH=self.patch_size, BLOCK=self.embedding.block,
            PRECISION=math_options(grad_h.dtype, grad_h.device)["PRECISION"],
        )  # fmt: skip

    def weight_sums(self) -> tuple[torch.Tensor, ...]:
        """Gradients of the weights in float32."""
        pixel_weight = self.grad_pixel_weight.sum((0, 1)).T.contiguous()
        pixel_table = self.grad_pixel_table.view(-1, self.patch_size**2, self.width).sum(0)
        blocks = unpack_grad((self.grad_matrix, self.grad_bias), self.weights.blocks, torch.float32)
        return (pixel_weight, pixel_table, *blocks, self.grad_head_weight.sum(0), self.grad_head_bias.sum(0))

    def grad_weights(self) -> tuple[torch.Tensor, ...]:
        """Gradients of the weights in their dtypes."""
        pairs = zip(self.weight_sums(), flat(self.weights), strict=True)
        return tuple(total.to(weight.dtype) for total, weight in pairs)


# -------------------------------------------------------------------------------------------------------------- ops


def activation_shape(pixels: int, depth: int, width: int) -> tuple[int, int, int]:
    """Of what the backward otherwise computes again: h before each block and the head."""
    return depth + 1, pixels, width


def states_of(activations: torch.Tensor | None, weights: DecoderWeights) -> torch.Tensor | None:
    """[N + 1, tokens, P, D] from activations [N + 1, pixels, D]."""
    return None if activations is None else activations.view(len(activations), -1, *weights.pixel_table.shape)


def part_of_states(states: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if states is None else states[:, part]


def forward(
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
    activations: torch.Tensor | None = None,
) -> torch.Tensor:
    """velocity [B, C, H, W] in the dtype of cond; writes `activations` of `activation_shape` if they are given."""
    velocity = torch.empty(image.shape, dtype=cond.dtype, device=cond.device)
    image = readable_image(image)
    with device_guard(cond):
        packed = pack(weights.blocks, cond.dtype)
        decoder_weights = query_and_head(weights)
        tokens, queries = collapsed_rows(cond, 2), pixel_rows(query)
        states = states_of(activations, weights)
        for part in slices(tokens.shape[0], LAUNCH_TOKENS):
            run_forward(
                image, tokens[part], part_of(queries, part), packed, decoder_weights, velocity, part.start,
                patch_size, head_norm, eps, part_of_states(states, part),
            )  # fmt: skip
    return velocity


def backward(
    grad_velocity: torch.Tensor,
    image: torch.Tensor,
    cond: torch.Tensor,
    weights: DecoderWeights,
    query: torch.Tensor | None,
    patch_size: int,
    head_norm: str,
    eps: float,
    needs: Sequence[bool],
    activations: torch.Tensor | None = None,
) -> Gradients:
    """Gradients of (image, cond, weights, query); None where `needs` is False.

    `activations` are those that the forward has written; None if they are computed again.
    """
    grad_cond = torch.empty(cond.shape, dtype=cond.dtype, device=cond.device)
    grad_query = None
    if query is not None and needs[-1]:
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    with device_guard(cond):
        needed = (needs[0], needs[1], any(needs[2:-1]))
        sums = DecoderBackward(image, grad_velocity, weights, cond.dtype, patch_size, head_norm, eps, needed)
        tokens = collapsed_rows(cond, 2)
        states = states_of(activations, weights)
        sums.add(tokens, pixel_rows(query), 0, grad_cond.view(tokens.shape), pixel_rows(grad_query), states)
        grad_weights = sums.grad_weights() if needed[2] else (None,) * len(needs[2:-1])
    grads = (sums.grad_image, grad_cond, *grad_weights, grad_query)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
