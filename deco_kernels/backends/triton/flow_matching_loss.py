"""flow_matching_loss and frequency_loss on Triton: one pass over pred and target, and another for the gradient.

With d = pred - target, M the RGB -> YCbCr matrix and F the orthonormal 8x8 block DCT-II,
    pixel = mean(d²),  frequency = mean(w·F(M d)²),  total = pixel + frequency_scale·frequency,
per sample, weighted by sample_weight and averaged over the batch. F is linear: with K its 64x64 matrix on a flattened
block, the sum of w·F² over a block of one YCbCr channel is ⟨x, A x⟩ with A = Kᵀ·diag(w)·K, and its gradient is 2·A x.
One 64x64 matmul per channel gives both, computed as three TF32 matmuls for float32 images and as three bfloat16 matmuls
for 16-bit images.

A persistent program iterates over tiles of `block` 8x8 blocks of one sample; A (48 kB in total) passes through shared
memory, the tile stays in registers. Bytes per pixel, bfloat16: 12 in the forward, 18 in the backward. FLOPs per pixel:
1,200 in either. Every tile writes its own two sums, which one program adds in fixed order: same sizes, same bits.

Sizes that are not multiples of 8 are padded right and bottom by reflection during loads. Their backward writes the
gradient of the padded image (float32) to a workspace and then folds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from deco_kernels.backends.arguments import Gradients, Losses, empty_gradients, zeroed
from deco_kernels.signatures import BLOCK, Loss

from .launching import device_guard, launch, math_options, parameters_for, program_limit, readable_image
from .loss_padding import fold_kernel
from .loss_tiles import (
    block_dct,
    block_offsets,
    form_product,
    load_tile,
    split_bfloat16,
    store_gradients,
    store_sums,
    sum_of_products,
    ycbcr_row,
)
from .table import Launch

_FORMS = Launch(block=0, warps=8, stages=1, programs_per_multiprocessor=1)
_SMALL = Launch(block=1024, warps=4, stages=1, programs_per_multiprocessor=1)

# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def quadratic_form_kernel(
    frequency_weight_ptr,  # [3, 64] contiguous
    forms_ptr,  # out [3, 64, 64] float32, or [3, 2, 64, 64] bfloat16: high and low part
    PRECISION: tl.constexpr,
):
    """Program c: A = Kᵀ·diag(w_c)·K of channel c."""
    e = tl.arange(0, 64)
    channel = tl.program_id(0)
    weight = tl.load(frequency_weight_ptr + channel * 64 + e).to(tl.float32)
    dct = block_dct()
    form = tl.dot(tl.trans(dct), dct * weight[:, None], input_precision=PRECISION)
    pointers = e[:, None] * 64 + e[None, :]
    if forms_ptr.dtype.element_ty == tl.float32:
        tl.store(forms_ptr + channel * 4096 + pointers, form)
    else:
        high, low = split_bfloat16(form)
        tl.store(forms_ptr + channel * 8192 + pointers, high)
        tl.store(forms_ptr + channel * 8192 + 4096 + pointers, low)


@triton.jit
def coefficients_kernel(
    grad_total_ptr, grad_pixel_ptr, grad_frequency_ptr,  # float32 scalars
    coefficients_ptr,  # out [3] float32
    pixel_count, padded_count,  # values per sample, without and with padding
    batch,
    SCALE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Factors of d and of A·(M d) in the gradient of one sample, without its weight, and whether it is to be written.

    With KEPT, two incoming gradients are 0, and the gradient is in its place if the third is 1.
    """
    grad_total = tl.load(grad_total_ptr)
    grad_pixel = grad_total + tl.load(grad_pixel_ptr)
    grad_frequency = SCALE * grad_total + tl.load(grad_frequency_ptr)
    tl.store(coefficients_ptr, 2.0 * grad_pixel / pixel_count.to(tl.float32) / batch)
    tl.store(coefficients_ptr + 1, 2.0 * grad_frequency / padded_count.to(tl.float32) / batch)
    incoming = grad_pixel + tl.load(grad_frequency_ptr)
    tl.store(coefficients_ptr + 2, tl.where((incoming == 1.0) & KEPT, 0.0, 1.0))


@triton.jit
def sums_kernel(
    pred_ptr, pred_stride_b, pred_stride_c, pred_stride_h, pred_stride_w,  # [B, 3, H, W]
    target_ptr, target_stride_b, target_stride_c, target_stride_h, target_stride_w,  # [B, 3, H, W]
    forms_ptr,  # A of Y, Cb, Cr, see form_product
    sums_ptr,  # out [B, tiles per sample, 2] float32: sums of d² and of w·F² over a tile
    height, width,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b, g) processes every G-th tile of sample b."""
    sample = tl.program_id(0).to(tl.int64)
    pred_ptr += sample * pred_stride_b
    target_ptr += sample * target_stride_b
    n_tiles = tl.cdiv(tl.cdiv(width, 8) * tl.cdiv(height, 8), BLOCK)
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        r, g, b, block_y, block_x, valid = load_tile(
            pred_ptr, pred_stride_c, pred_stride_h, pred_stride_w,
            target_ptr, target_stride_c, target_stride_h, target_stride_w, tile, height, width, PADDED, BLOCK,
        )  # fmt: skip
        squares = sum_of_products(r, r, g, g, b, b)
        if PADDED:
            e = tl.arange(0, 64)[None, :]
            real = (block_y[:, None] * 8 + e // 8 < height) & (block_x[:, None] * 8 + e % 8 < width)
            squares = tl.where(real, squares, 0.0)
        energy = tl.zeros([BLOCK, 64], tl.float32)
        for channel in range(3):  # not unrolled: the operands of one channel at a time fit in registers
            of_r, of_g, of_b = ycbcr_row(channel)
            x = sum_of_products(of_r, r, of_g, g, of_b, b)
            energy += x * form_product(x, forms_ptr, channel, PRECISION)
        store_sums(sums_ptr, sample * n_tiles + tile, squares, energy)


@triton.jit
def losses_kernel(
    sums_ptr,  # [B, G, 2] float32
    sample_weight_ptr,  # [B]; unused without WEIGHTED
    losses_ptr,  # out [3] float32: total, pixel, frequency
    n_sums, sums_per_sample,  # B·G and G
    pixel_count, padded_count,  # values per sample, without and with padding
    batch,
    SCALE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds all partial sums in fixed order."""
    pixel = tl.zeros([BLOCK], tl.float32)
    frequency = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_sums, BLOCK):
        index = start + tl.arange(0, BLOCK)
        valid = index < n_sums
        pixel_sum = tl.load(sums_ptr + 2 * index, mask=valid, other=0.0)
        frequency_sum = tl.load(sums_ptr + 2 * index + 1, mask=valid, other=0.0)
        if WEIGHTED:
            weight = tl.load(sample_weight_ptr + index // sums_per_sample, mask=valid, other=0.0).to(tl.float32)
            pixel_sum *= weight
            frequency_sum *= weight
        pixel += pixel_sum
        frequency += frequency_sum
    pixel_loss = tl.sum(pixel, 0) / pixel_count.to(tl.float32) / batch
    frequency_loss = tl.sum(frequency, 0) / padded_count.to(tl.float32) / batch
    tl.store(losses_ptr, pixel_loss + SCALE * frequency_loss)
    tl.store(losses_ptr + 1, pixel_loss)
    tl.store(losses_ptr + 2, frequency_loss)


@triton.jit
def gradient_kernel(
    pred_ptr, pred_stride_b, pred_stride_c, pred_stride_h, pred_stride_w,  # [B, 3, H, W]
    target_ptr, target_stride_b, target_stride_c, target_stride_h, target_stride_w,  # [B, 3, H, W]
    forms_ptr,  # A of Y, Cb, Cr, see form_product
    coefficients_ptr,  # [3] float32, from coefficients_kernel
    sample_weight_ptr,  # [B]; unused without WEIGHTED
    grad_pred_ptr, grad_target_ptr,  # out [B, 3, H, W] contiguous; unused with PADDED
    grad_padded_ptr,  # with PADDED: out [B, 3, H', W'] float32, frequency part on the padded image
    sums_ptr,  # with SUMS: out [B, tiles per sample, 2] float32, as in sums_kernel
    height, width,
    SUMS: tl.constexpr, PADDED: tl.constexpr, WEIGHTED: tl.constexpr,
    PRED_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b, g) processes every G-th tile of sample b."""
    e = tl.arange(0, 64)
    sample = tl.program_id(0).to(tl.int64)
    pred_ptr += sample * pred_stride_b
    target_ptr += sample * target_stride_b
    blocks_x = tl.cdiv(width, 8)
    n_blocks = blocks_x * tl.cdiv(height, 8)
    of_pixel = tl.load(coefficients_ptr)
    of_frequency = tl.load(coefficients_ptr + 1)
    if WEIGHTED:
        weight = tl.load(sample_weight_ptr + sample).to(tl.float32)
        of_pixel *= weight
        of_frequency *= weight
    end = tl.where(tl.load(coefficients_ptr + 2) == 1.0, tl.cdiv(n_blocks, BLOCK), 0)
    for tile in range(tl.program_id(1), end, tl.num_programs(1)):
        r, g, b, block_y, block_x, valid = load_tile(
            pred_ptr, pred_stride_c, pred_stride_h, pred_stride_w,
            target_ptr, target_stride_c, target_stride_h, target_stride_w, tile, height, width, PADDED, BLOCK,
        )  # fmt: skip
        grad_r = tl.zeros([BLOCK, 64], tl.float32)
        grad_g = tl.zeros([BLOCK, 64], tl.float32)
        grad_b = tl.zeros([BLOCK, 64], tl.float32)
        for channel in range(3):
            of_r, of_g, of_b = ycbcr_row(channel)
            form_x = form_product(sum_of_products(of_r, r, of_g, g, of_b, b), forms_ptr, channel, PRECISION)
            grad_r += of_r * form_x
            grad_g += of_g * form_x
            grad_b += of_b * form_x
        if SUMS:  # the sum of x·A x over the channels
            n_tiles = tl.cdiv(n_blocks, BLOCK)
            squares = sum_of_products(r, r, g, g, b, b)
            energy = sum_of_products(r, grad_r, g, grad_g, b, grad_b)
            store_sums(sums_ptr, sample * n_tiles + tile, squares, energy)
        if PADDED:
            padded_width = blocks_x * 8
            plane = n_blocks.to(tl.int64) * 64
            row, column = block_y[:, None] * 8 + (e // 8)[None, :], block_x[:, None] * 8 + (e % 8)[None, :]
            pointers = grad_padded_ptr + sample * 3 * plane + row.to(tl.int64) * padded_width + column
            tl.store(pointers, of_frequency * grad_r, mask=valid)
            tl.store(pointers + plane, of_frequency * grad_g, mask=valid)
            tl.store(pointers + 2 * plane, of_frequency * grad_b, mask=valid)
        else:
            plane = height.to(tl.int64) * width
            offsets = sample * 3 * plane + block_offsets(block_y, block_x, height, width, width, 1, False)
            grad_r = tl.fma(of_frequency, grad_r, of_pixel * r)
            grad_g = tl.fma(of_frequency, grad_g, of_pixel * g)
            grad_b = tl.fma(of_frequency, grad_b, of_pixel * b)
            store_gradients(grad_pred_ptr, grad_target_ptr, offsets, grad_r, valid, PRED_GRAD, TARGET_GRAD)
            store_gradients(grad_pred_ptr, grad_target_ptr, offsets + plane, grad_g, valid, PRED_GRAD, TARGET_GRAD)
            store_gradients(grad_pred_ptr, grad_target_ptr, offsets + 2 * plane, grad_b, valid, PRED_GRAD, TARGET_GRAD)


@triton.jit
def spectrum_kernel(
    pred_ptr, pred_stride_b, pred_stride_c, pred_stride_h, pred_stride_w,  # [B, 3, H, W]
    target_ptr, target_stride_b, target_stride_c, target_stride_h, target_stride_w,  # [B, 3, H, W]
    spectrum_ptr,  # out [B, tiles per sample, 3, 64] float32: sums of F(M d)² over a tile
    height, width,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program b·tiles + tile: sums of squared coefficients, for the gradient of the frequency weight."""
    tiles = tl.cdiv(tl.cdiv(width, 8) * tl.cdiv(height, 8), BLOCK)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    r, g, b, _, _, _ = load_tile(
        pred_ptr + sample * pred_stride_b, pred_stride_c, pred_stride_h, pred_stride_w,
        target_ptr + sample * target_stride_b, target_stride_c, target_stride_h, target_stride_w,
        tl.program_id(0) % tiles, height, width, PADDED, BLOCK,
    )  # fmt: skip
    dct = tl.trans(block_dct())
    place = spectrum_ptr + tl.program_id(0).to(tl.int64) * 192 + tl.arange(0, 64)
    for channel in range(3):
        of_r, of_g, of_b = ycbcr_row(channel)
        coefficients = tl.dot(sum_of_products(of_r, r, of_g, g, of_b, b), dct, input_precision=PRECISION)
        tl.store(place + channel * 64, tl.sum(coefficients * coefficients, 0))


# -------------------------------------------------------------------------------------------------------------- host


def _padded(height: int, width: int) -> tuple[int, int]:
    return triton.cdiv(height, 8) * 8, triton.cdiv(width, 8) * 8


class LossCall:
    """The arguments of one call and the sizes derived from them."""

    def __init__(
        self,
        pred: torch.Tensor,
        target: torch.Tensor,
        frequency_weight: torch.Tensor,
        sample_weight: torch.Tensor | None,
    ):
        self.pred, self.target = readable_image(pred), readable_image(target)
        self.frequency_weight = frequency_weight.contiguous()
        self.sample_weight = None if sample_weight is None else sample_weight.contiguous()
        self.batch, _, self.height, self.width = pred.shape
        self.padded_height, self.padded_width = _padded(self.height, self.width)
        self.is_padded = (self.padded_height, self.padded_width) != (self.height, self.width)
        self.pixel_count = 3 * self.height * self.width
        self.padded_count = 3 * self.padded_height * self.padded_width
        self.single = torch.float32 in (pred.dtype, target.dtype)
        dtype = torch.float32 if self.single else pred.dtype
        self.forward = parameters_for("flow_matching_loss", 0, dtype, pred.device)
        self.backward = parameters_for("flow_matching_loss_backward", 0, dtype, pred.device)
        self.precision = math_options(torch.float32, pred.device)["PRECISION"]
        self.blocks = self.padded_count // (3 * 64)

    def images(self) -> tuple[torch.Tensor | int, ...]:
        return self.pred, *self.pred.stride(), self.target, *self.target.stride()

    def grid(self, parameters: Launch) -> tuple[int, int]:
        """Persistent grid (samples, programs per sample)."""
        programs = triton.cdiv(program_limit(self.pred.device, parameters), self.batch)
        return self.batch, min(triton.cdiv(self.blocks, parameters.block), programs)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.pred.device)

    def forms(self) -> torch.Tensor:
        forms = self.empty(3, 64, 64) if self.single else self.empty(3, 2, 64, 64, dtype=torch.bfloat16)
        launch(quadratic_form_kernel, (3,), _FORMS, self.frequency_weight, forms, PRECISION=self.precision)
        return forms

    def tiles(self, parameters: Launch) -> int:
        """Tiles of a sample."""
        return triton.cdiv(self.blocks, parameters.block)

    def new_sums(self, parameters: Launch) -> torch.Tensor:
        """Uninitialized [B, tiles, 2]."""
        return self.empty(self.batch, self.tiles(parameters), 2)

    def sums(self) -> torch.Tensor:
        sums = self.new_sums(self.forward)
        self.write_sums(self.forms(), sums)
        return sums

    def write_sums(self, forms: torch.Tensor, sums: torch.Tensor) -> None:
        """Write the sums [B, tiles of `forward`, 2]."""
        launch(
            sums_kernel, self.grid(self.forward), self.forward, *self.images(), forms, sums,
            self.height, self.width, PADDED=self.is_padded, BLOCK=self.forward.block, PRECISION=self.precision,
        )  # fmt: skip

    def losses(self, sums: torch.Tensor, frequency_scale: float) -> Losses:
        """(total, pixel, frequency) from the sums [B, tiles, 2]."""
        losses = self.empty(3)
        launch(
            losses_kernel, (1,), _SMALL, sums, self._weights(), losses, sums.shape[0] * sums.shape[1], sums.shape[1],
            self.pixel_count, self.padded_count, self.batch,
            SCALE=frequency_scale, WEIGHTED=self.sample_weight is not None, BLOCK=_SMALL.block,
        )  # fmt: skip
        total, pixel, frequency = losses.unbind()
        return total.clone(), pixel.clone(), frequency.clone()

    def _weights(self) -> torch.Tensor:
        return self.frequency_weight if self.sample_weight is None else self.sample_weight

    def coefficients(
        self, grads: Sequence[torch.Tensor | None], frequency_scale: float, kept: bool = False
    ) -> torch.Tensor:
        """Of the gradients of total, pixel and frequency; None for zero. `kept` as in coefficients_kernel."""
        coefficients = self.empty(3)
        zero = coefficients.new_zeros(()) if any(grad is None for grad in grads) else None
        launch(
            coefficients_kernel, (1,), _SMALL, *(zero if grad is None else grad for grad in grads), coefficients,
            self.pixel_count, self.padded_count, self.batch, SCALE=frequency_scale, KEPT=kept,
        )  # fmt: skip
        return coefficients

    def grad_images(self, coefficients: torch.Tensor, pred_needed: bool, target_needed: bool) -> Gradients:
        grad_pred = torch.empty(self.pred.shape, dtype=self.pred.dtype, device=self.pred.device)
        grad_target = torch.empty(self.target.shape, dtype=self.target.dtype, device=self.target.device)
        grads = (grad_pred if pred_needed else None, grad_target if target_needed else None)
        if not self.is_padded:
            self.write_gradients(self.forms(), coefficients, *grads)
            return grads
        grad_padded = self.empty(self.batch, 3, self.padded_height, self.padded_width)
        self.write_gradients(self.forms(), coefficients, None, None, grad_padded)
        tiles = triton.cdiv(self.height * self.width, _SMALL.block)
        launch(
            fold_kernel, (self.batch * 3 * tiles,), _SMALL, *self.images(), coefficients, self._weights(), grad_padded,
            grad_pred, grad_target, self.height, self.width, BLOCK=_SMALL.block,
            WEIGHTED=self.sample_weight is not None, PRED_GRAD=pred_needed, TARGET_GRAD=target_needed,
        )  # fmt: skip
        return grads

    def write_gradients(
        self,
        forms: torch.Tensor,
        coefficients: torch.Tensor,
        grad_pred: torch.Tensor | None,
        grad_target: torch.Tensor | None,
        grad_padded: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> None:
        """Write the gradients of the images, contiguous, or of the padded ones, and the sums.

        Sums are [B, tiles of `backward`, 2]. What is None is not computed; grad_pred may be pred.
        """
        unused = coefficients
        launch(
            gradient_kernel, self.grid(self.backward), self.backward, *self.images(), forms, coefficients,
            self._weights(), *(unused if t is None else t for t in (grad_pred, grad_target, grad_padded, sums)),
            self.height, self.width,
            SUMS=sums is not None, PADDED=self.is_padded, WEIGHTED=self.sample_weight is not None,
            PRED_GRAD=grad_pred is not None, TARGET_GRAD=grad_target is not None,
            BLOCK=self.backward.block, PRECISION=self.precision,
        )  # fmt: skip

    def spectrum(self) -> torch.Tensor:
        """Weighted sums of F(M d)² over the batch, [3, 64]."""
        tiles = self.tiles(self.backward)
        spectrum = self.empty(self.batch, tiles, 3, 64)
        launch(
            spectrum_kernel, (self.batch * tiles,), self.backward, *self.images(), spectrum,
            self.height, self.width, PADDED=self.is_padded, BLOCK=self.backward.block, PRECISION=self.precision,
        )  # fmt: skip
        per_sample = spectrum.sum(1)
        if self.sample_weight is not None:
            per_sample = per_sample * self.sample_weight.float()[:, None, None]
        return per_sample.sum(0)


def grad_frequency_weight(spectrum: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """[3, 8, 8] from `LossCall.spectrum`; 0.5·coefficients are the derivatives of the loss by a sample's two sums."""
    return (spectrum * (0.5 * coefficients[1])).view(3, 8, 8)


def grad_sample_weight(sums: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """[B] from the sums [B, tiles, 2]."""
    return (sums.sum(1) * (0.5 * coefficients[:2])).sum(1)


def no_losses(like: torch.Tensor) -> Losses:
    """Of an empty batch."""
    total, pixel, frequency = torch.zeros(3, dtype=torch.float32, device=like.device).unbind()
    return total.clone(), pixel.clone(), frequency.clone()


def forward(
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
) -> Losses:
    """(total, pixel, frequency), float32 scalars."""
    with device_guard(pred):
        if pred.shape[0] == 0:
            return no_losses(pred)
        loss = LossCall(pred, target, frequency_weight, sample_weight)
        return loss.losses(loss.sums(), frequency_scale)


def keeps_gradient(inputs: Loss) -> bool:
    """Whether one pass gives the losses and the gradient of pred: if it has pixels, and is not padded."""
    return inputs.pred.numel() > 0 and all(side % BLOCK == 0 for side in inputs.pred.shape[2:])


def forward_with_gradient(inputs: Loss, frequency_scale: float) -> tuple[Losses, torch.Tensor]:
    """The losses, and the gradient of total with respect to pred, for inputs with `keeps_gradient`."""
    one = torch.ones((), dtype=torch.float32, device=inputs.pred.device)
    return _losses_and_gradient(inputs, (one, None, None), frequency_scale)


def kept_backward(gradient: torch.Tensor, grad_total: torch.Tensor, inputs: Loss, frequency_scale: float) -> None:
    """Changes a gradient from `forward_with_gradient` into that for `grad_total`."""
    _complete(gradient, (grad_total, None, None), inputs, frequency_scale)


def _losses_and_gradient(
    inputs: Loss, grads: Sequence[torch.Tensor | None], frequency_scale: float
) -> tuple[Losses, torch.Tensor]:
    """The losses, and the gradient of pred for the gradients of total, pixel and frequency."""
    with device_guard(inputs.pred):
        loss = LossCall(*inputs)
        sums = loss.new_sums(loss.backward)
        gradient = torch.empty(inputs.pred.shape, dtype=inputs.pred.dtype, device=inputs.pred.device)
        loss.write_gradients(loss.forms(), loss.coefficients(grads, frequency_scale), gradient, None, sums=sums)
        return loss.losses(sums, frequency_scale), gradient


def _complete(
    gradient: torch.Tensor, grads: Sequence[torch.Tensor | None], inputs: Loss, frequency_scale: float
) -> None:
    """Write the gradient of pred, unless the incoming gradient that is not None is 1; the kernels read it."""
    with device_guard(gradient):
        loss = LossCall(*inputs)
        loss.write_gradients(loss.forms(), loss.coefficients(grads, frequency_scale, kept=True), gradient, None)


def backward(
    grad_total: torch.Tensor | None,
    grad_pixel: torch.Tensor | None,
    grad_frequency: torch.Tensor | None,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    frequency_scale: float,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of (pred, target, frequency_weight, sample_weight); None where `needs` is False.

    The gradient of a loss is None if it is zero.
    """
    with device_guard(pred):
        if pred.shape[0] == 0:
            return zeroed(empty_gradients((pred, target, frequency_weight, sample_weight), needs))
        loss = LossCall(pred, target, frequency_weight, sample_weight)
        coefficients = loss.coefficients((grad_total, grad_pixel, grad_frequency), frequency_scale)
        grad_pred = grad_target = None
        if needs[0] or needs[1]:
            grad_pred, grad_target = loss.grad_images(coefficients, needs[0], needs[1])
        return (
            grad_pred,
            grad_target,
            grad_frequency_weight(loss.spectrum(), coefficients).to(frequency_weight.dtype) if needs[2] else None,
            grad_sample_weight(loss.sums(), coefficients).to(sample_weight.dtype)
            if needs[3] and sample_weight is not None
            else None,
        )


def frequency_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, frequency_weight: torch.Tensor, sample_weight: torch.Tensor | None
) -> torch.Tensor:
    """The frequency loss, a float32 scalar."""
    return forward(pred, target, frequency_weight, sample_weight, 1.0)[2]


def frequency_loss_forward_with_gradient(inputs: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward_with_gradient` of the frequency loss."""
    one = torch.ones((), dtype=torch.float32, device=inputs.pred.device)
    losses, gradient = _losses_and_gradient(inputs, (None, None, one), 1.0)
    return losses[2], gradient


def frequency_loss_kept_backward(gradient: torch.Tensor, grad: torch.Tensor, inputs: Loss) -> None:
    """`kept_backward` of the frequency loss."""
    _complete(gradient, (None, None, grad), inputs, 1.0)


def frequency_loss_backward(
    grad: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    frequency_weight: torch.Tensor,
    sample_weight: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of (pred, target, frequency_weight, sample_weight); None where `needs` is False."""
    return backward(None, None, grad, pred, target, frequency_weight, sample_weight, 1.0, needs)
