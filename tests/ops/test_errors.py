"""Bad input: the error type, and that the message names the argument."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import deco_kernels
from deco_kernels import ops
from tests.ops.cases import F32, OPS, differentiable, small_inputs

each_op = pytest.mark.parametrize("op", OPS)


def call(op, **changes):
    inputs = small_inputs(op)
    return getattr(ops, op)(**{**inputs.tensors, **inputs.options, **changes})


def tensor_names(op):
    return list(small_inputs(op).tensors)


ALL_TENSORS = [(op, name) for op in OPS for name in tensor_names(op)]
each_tensor = pytest.mark.parametrize(("op", "name"), ALL_TENSORS)


@each_tensor
@pytest.mark.parametrize("value", [3.0, "text", [1.0], object()])
def test_not_a_tensor(op, name, value):
    with pytest.raises(TypeError, match=f"{op}: {name}: expected a torch.Tensor"):
        call(op, **{name: value})


@each_tensor
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtype_that_is_not_supported(op, name, dtype):
    with pytest.raises(TypeError, match=f"{op}: {name}: .*got {dtype}"):
        call(op, **{name: small_inputs(op).tensors[name].to(dtype)})


@each_tensor
def test_a_lone_float64(op, name):
    with pytest.raises(TypeError, match="float64"):
        call(op, **{name: small_inputs(op).tensors[name].double()})


@each_tensor
def test_mixed_devices(op, name):
    with pytest.raises(TypeError, match="device"):
        call(op, **{name: small_inputs(op).tensors[name].to("meta")})


@each_tensor
def test_sparse_tensor(op, name):
    with pytest.raises(TypeError, match=f"{op}: {name}: expected a strided tensor"):
        call(op, **{name: small_inputs(op).tensors[name].to_sparse()})


@each_tensor
def test_a_size_too_many(op, name):
    tensor = small_inputs(op).tensors[name]
    for axis in range(tensor.dim()):
        with pytest.raises(ValueError, match=f"{op}: "):
            call(op, **{name: torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)})


@each_tensor
def test_wrong_rank(op, name):
    tensor = small_inputs(op).tensors[name]
    with pytest.raises(ValueError, match=f"{op}: "):
        call(op, **{name: tensor[0]})
    if name not in ("h", "cond", "tokens"):
        with pytest.raises(ValueError, match=f"{op}: {name}: "):
            call(op, **{name: tensor[None]})


@each_op
def test_scalar_in_place_of_a_tensor(op):
    for name in tensor_names(op):
        with pytest.raises(ValueError, match=f"{op}: "):
            call(op, **{name: torch.tensor(1.0)})


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens"])
@pytest.mark.parametrize(
    ("patch_size", "error"), [(3, ValueError), (0, ValueError), (-4, ValueError), (4.0, TypeError), (True, TypeError)]
)
def test_patch_size(op, patch_size, error):
    with pytest.raises(error, match=f"{op}: (patch_size|image)"):
        call(op, patch_size=patch_size)


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens"])
def test_patch_size_of_numpy(op):
    assert torch.equal(call(op, patch_size=np.int64(4)), call(op, patch_size=4))


def test_patches_that_are_not_square():
    """P is 6 in all arguments: the reference computes it, backends that need square patches refuse it."""
    inputs = small_inputs("upsample_modulate", patch_size=4)
    tensors = dict(inputs.tensors, h=inputs.tensors["h"][:, :6])
    for name in ("up_weight", "up_bias"):
        tensors[name] = tensors[name][: 6 * tensors["h"].shape[-1]]
    assert ops.upsample_modulate(**tensors)[0].shape == tensors["h"].shape
    with pytest.raises(deco_kernels.BackendUnavailable, match="square patches .* not 6"):
        ops.upsample_modulate(**tensors, backend="cpu")


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens", "adaln_block", "upsample_modulate"])
@pytest.mark.parametrize(
    ("eps", "error"),
    [(-1e-6, ValueError), (10**400, ValueError), (float("nan"), ValueError), ("1e-6", TypeError), (None, TypeError)],
)
def test_eps(op, eps, error):
    with pytest.raises(error, match=f"{op}: eps"):
        call(op, eps=eps)


@pytest.mark.parametrize(
    ("value", "error"), [(None, TypeError), (float("inf"), ValueError), (torch.ones(()), TypeError)]
)
def test_frequency_scale(value, error):
    with pytest.raises(error, match="frequency_scale"):
        call("flow_matching_loss", frequency_scale=value)


@pytest.mark.parametrize("op", ["flow_matching_loss", "frequency_loss"])
@pytest.mark.parametrize("size", [(4, 16), (16, 3), (0, 8)])
def test_losses_refuse_images_that_cannot_be_padded(op, size):
    image = torch.randn(1, 3, *size)
    with pytest.raises(ValueError, match=f"{op}: pred: expected a (height|width) of at least 5"):
        call(op, pred=image, target=image, sample_weight=None)


@each_op
def test_backend_names(op):
    with pytest.raises(ValueError, match="unknown name 'cud'.*'cpu'"):
        call(op, backend="cud")
    with pytest.raises(TypeError, match="backend"):
        call(op, backend=3)


@each_op
def test_backend_that_needs_another_device(op):
    with pytest.raises(deco_kernels.BackendUnavailable, match="backend 'cuda' cannot serve"):
        call(op, backend="cuda")


@pytest.mark.parametrize("op", ["pixel_decoder", "pixel_decoder_from_tokens", "adaln_block", "upsample_modulate"])
def test_width_without_a_kernel_goes_to_the_reference(op):
    inputs = small_inputs(op, width=24)
    expected = getattr(ops, op)(**inputs.tensors, **inputs.options, backend="reference")
    actual = getattr(ops, op)(**inputs.tensors, **inputs.options)
    for pair in zip(actual, expected, strict=True):
        assert torch.equal(*pair)
    with pytest.raises(deco_kernels.BackendUnavailable, match="24"):
        getattr(ops, op)(**inputs.tensors, **inputs.options, backend="cpu")


@each_op
def test_second_derivatives(op):
    inputs = small_inputs(op)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items()}
    outputs, grad_outputs = differentiable(getattr(ops, op)(**leaves, **inputs.options), inputs.grad_outputs)
    first = next(iter(leaves.values()))
    (gradient,) = torch.autograd.grad(outputs, first, grad_outputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: second derivatives"):
        gradient.sum().backward()


@each_op
def test_forward_mode_is_refused_not_dropped(op):
    inputs = small_inputs(op)
    name, tensor = next(iter(inputs.tensors.items()))

    def function(value):
        return getattr(ops, op)(**{**inputs.tensors, name: value}, **inputs.options)

    tangent = torch.ones_like(tensor)
    with pytest.raises(NotImplementedError, match=rf"{op}: forward-mode derivatives \(jvp\).*use reverse mode"):
        torch.func.jvp(function, (tensor,), (tangent,))
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(tensor, tangent)
        with pytest.raises(NotImplementedError, match=rf"{op}: forward-mode derivatives \(jvp\).*use reverse mode"):
            function(dual)


def test_dtensor():
    class DTensor(torch.Tensor):
        pass

    inputs = small_inputs("pixel_decoder")
    weight = inputs.tensors["fc1_weight"].as_subclass(DTensor)
    with pytest.raises(TypeError, match="fc1_weight.*FSDP unit"):
        ops.pixel_decoder(**{**inputs.tensors, "fc1_weight": weight}, **inputs.options)


def test_other_subclasses_of_tensor_are_welcome():
    class Named(torch.Tensor):
        pass

    inputs = small_inputs("adaln_block")
    expected = ops.adaln_block(**inputs.tensors)
    actual = ops.adaln_block(**{**inputs.tensors, "h": inputs.tensors["h"].as_subclass(Named)})
    assert torch.equal(actual.as_subclass(torch.Tensor), expected)
    assert actual.dtype is F32
