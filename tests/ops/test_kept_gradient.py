"""Losses whose forward keeps the gradient of `pred`: equal to two passes, and left alone by everything around it."""

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deco_kernels import ops, testing
from deco_kernels.backends import execution
from deco_kernels.backends.cpu import flow_matching_loss
from deco_kernels.ops import registry
from tests.ops.cases import BF16, F16, F32, IMPLEMENTATIONS

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
each_loss = pytest.mark.parametrize("loss", ["flow_matching_loss", "frequency_loss"])
ONE_PASS = ["forward_with_gradient", "kept_backward"]
TWO_PASSES = ["forward", "backward"]
FACTORS = (1.0, 0.25, 2.0**16, 0.3, -1.0, 0.0)
WHOLE, PADDED = (2, 24, 32), (2, 21, 30)


def loss_tensors(size=PADDED, dtype=F32, weighted=True):
    tensors = dict(testing.random_inputs("flow_matching_loss", image_size=size, dtype=dtype).tensors)
    if not weighted:
        tensors["sample_weight"] = None
    return tensors


def first_loss(loss, tensors, backend):
    """The loss that a training step differentiates, and all losses."""
    losses = getattr(ops, loss)(**tensors, backend=backend)
    losses = losses if isinstance(losses, tuple) else (losses,)
    return losses[0], losses


def in_two_passes(loss, tensors, factor, backend):
    """The losses and the gradient of pred, with a gradient of target too, which is not kept."""
    leaves = {**tensors, **{name: tensors[name].detach().requires_grad_() for name in ("pred", "target")}}
    first, losses = first_loss(loss, leaves, backend)
    return losses, torch.autograd.grad(first * factor, (leaves["pred"], leaves["target"]))[0]


@pytest.fixture
def served(monkeypatch):
    """Names of the backend functions that are called."""
    names, serve = [], registry.serve

    def recorded(function, *arguments):
        names.append(function)
        return serve(function, *arguments)

    for module in (registry, ops.kept_gradient):
        monkeypatch.setattr(module, "serve", recorded)
    return names


@each_implementation
@each_loss
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size", [WHOLE, PADDED, (1, 250, 701)], ids=["whole", "padded", "large"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_the_gradient_is_that_of_two_passes(implementation, loss, dtype, size, weighted):
    """For any incoming gradient; float16 with a factor of 2^16 too, which would reveal an earlier rounding."""
    tensors = loss_tensors(size, dtype, weighted)
    for factor in FACTORS:
        losses, expected = in_two_passes(loss, tensors, factor, implementation)
        pred = tensors["pred"].detach().requires_grad_()
        first, kept_losses = first_loss(loss, {**tensors, "pred": pred}, implementation)
        (gradient,) = torch.autograd.grad(first * factor, pred)
        assert all(map(torch.equal, kept_losses, losses))
        assert torch.equal(gradient, expected), factor
        assert gradient.dtype is dtype and gradient.is_contiguous()


@each_loss
@pytest.mark.parametrize("make", [torch.Tensor.requires_grad_, torch.nn.Parameter])
def test_one_pass_serves_a_training_step(loss, make, served):
    prefix = "" if loss == "flow_matching_loss" else "frequency_loss_"
    for dtype, names in ((F32, ONE_PASS), (BF16, ONE_PASS), (F16, TWO_PASSES)):
        tensors = loss_tensors(dtype=dtype)
        tensors["frequency_weight"] = torch.nn.Parameter(tensors["frequency_weight"], requires_grad=False)
        first_loss(loss, {**tensors, "pred": make(tensors["pred"])}, "cpu")[0].backward()
        assert served == [prefix + name for name in names]
        served.clear()


@each_loss
@pytest.mark.parametrize("needed", ["target", "frequency_weight", "sample_weight"])
def test_other_gradients_take_two_passes(loss, needed, served):
    tensors = loss_tensors()
    for name in ("pred", needed):
        tensors[name].requires_grad_()
    first_loss(loss, tensors, "cpu")[0].backward()
    assert [name.removeprefix("frequency_loss_") for name in served] == TWO_PASSES


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@each_implementation
def test_every_combination_of_losses(implementation, used, served):
    """Only the first one alone uses the kept gradient."""
    tensors = loss_tensors()
    leaves = [tensors["pred"].detach().requires_grad_() for _ in range(2)]
    targets = [tensors["target"], tensors["target"].detach().requires_grad_()]
    found = []
    for pred, target in zip(leaves, targets, strict=True):
        losses = ops.flow_matching_loss(**{**tensors, "pred": pred, "target": target}, backend=implementation)
        sum(losses[index] for index in used).backward()
        found.append(pred.grad)
    assert found[0].any() and torch.equal(*found)
    assert ("kept_backward" in served) == (used == (0,) and "forward_with_gradient" in served)


@each_implementation
@each_loss
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_second_backward_has_its_own_gradient(implementation, loss, factor):
    """Also if the first one was changed in place."""
    tensors = loss_tensors()
    _, expected = in_two_passes(loss, tensors, factor, implementation)
    pred = tensors["pred"].detach().requires_grad_()
    first, _ = first_loss(loss, {**tensors, "pred": pred}, implementation)
    (gradient,) = torch.autograd.grad(first * factor, pred, retain_graph=True)
    gradient.fill_(7)
    again = [torch.autograd.grad(first * factor, pred, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(again[0], expected) and torch.equal(again[1], expected)
    assert len({tensor.data_ptr() for tensor in (gradient, *again)}) == 3


@each_implementation
def test_gradients_accumulate_over_calls(implementation):
    tensors = loss_tensors()
    pred = tensors["pred"].detach().requires_grad_()
    for factor in (1.0, 0.5, 0.3):
        (first_loss("flow_matching_loss", {**tensors, "pred": pred}, implementation)[0] * factor).backward()
    parts = [in_two_passes("flow_matching_loss", tensors, factor, implementation)[1] for factor in (1.0, 0.5, 0.3)]
    assert torch.equal(pred.grad, parts[0] + parts[1] + parts[2])


@each_implementation
def test_the_gradient_reaches_what_is_before_pred(implementation):
    tensors = loss_tensors()
    scale = torch.tensor(0.5, requires_grad=True)
    pred = (tensors["pred"] * scale).clone()
    pred.retain_grad()
    first_loss("flow_matching_loss", {**tensors, "pred": pred}, implementation)[0].backward()
    _, expected = in_two_passes("flow_matching_loss", {**tensors, "pred": pred.detach()}, 1.0, implementation)
    assert torch.equal(pred.grad, expected)
    assert torch.equal(scale.grad, (expected * tensors["pred"]).sum())


@pytest.mark.parametrize("name", ["pred", "target"])
def test_a_change_in_place_between_forward_and_backward_is_noticed(name):
    tensors = loss_tensors()
    pred = tensors["pred"].requires_grad_() * 1
    loss, _ = first_loss("flow_matching_loss", {**tensors, "pred": pred}, "cpu")
    {**tensors, "pred": pred}[name].detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_that_is_freed_says_so():
    tensors = loss_tensors()
    loss, _ = first_loss("flow_matching_loss", {**tensors, "pred": tensors["pred"].requires_grad_()}, "cpu")
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused():
    tensors = loss_tensors()
    pred = tensors["pred"].requires_grad_()
    loss, _ = first_loss("flow_matching_loss", tensors, "cpu")
    (gradient,) = torch.autograd.grad(loss, pred, create_graph=True)
    assert torch.equal(gradient, in_two_passes("flow_matching_loss", tensors, 1.0, "cpu")[1])
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    tensors = loss_tensors()
    pred = tensors["pred"].requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pred, torch.ones_like(pred))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            first_loss("flow_matching_loss", {**tensors, "pred": dual}, "cpu")


def test_a_batch_of_incoming_gradients():
    tensors = loss_tensors()
    pred = tensors["pred"].requires_grad_()
    loss, _ = first_loss("flow_matching_loss", tensors, "cpu")
    factors = torch.tensor([1.0, 0.3])
    (found,) = torch.autograd.grad(loss, pred, factors, is_grads_batched=True)
    for gradient, factor in zip(found, factors.tolist(), strict=True):
        assert torch.equal(gradient, in_two_passes("flow_matching_loss", tensors, factor, "cpu")[1])


def test_functional_transforms_take_two_passes(served):
    tensors = loss_tensors(weighted=False)
    others = {name: tensor for name, tensor in tensors.items() if name != "pred"}

    def loss(pred):
        return first_loss("flow_matching_loss", {"pred": pred, **others}, "cpu")[0]

    for pred in (tensors["pred"], tensors["pred"].detach().requires_grad_()):
        found = torch.func.grad(loss)(pred)
        assert "forward_with_gradient" not in served
        assert torch.equal(found, in_two_passes("flow_matching_loss", tensors, 1.0, "cpu")[1])


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "vjp", "jvp"])
def test_a_pred_that_a_transform_does_not_wrap(transform, served):
    """Though it needs a gradient of its own."""
    tensors = loss_tensors()
    pred = tensors["pred"].requires_grad_()
    expected = first_loss("flow_matching_loss", tensors, "cpu")[0].detach()
    served.clear()

    def scaled(factor):
        return factor * first_loss("flow_matching_loss", tensors, "cpu")[0]

    two = torch.tensor(2.0)
    apply = {
        "grad": lambda: torch.func.grad(scaled)(two),
        "jacrev": lambda: torch.func.jacrev(scaled)(two),
        "vmap": lambda: torch.func.vmap(scaled)(torch.ones(3))[1],
        "vjp": lambda: torch.func.vjp(scaled, two)[1](torch.ones(()))[0],
        "jvp": lambda: torch.func.jvp(scaled, (two,), (torch.ones(()),))[1],
    }
    assert torch.equal(apply[transform]().detach(), expected)
    assert set(served) == {"forward"} and pred.grad is None


def test_a_pytorch_that_does_not_tell_transforms_takes_two_passes(served, monkeypatch):
    monkeypatch.setattr(execution, "transforms_are_active", None)
    tensors = loss_tensors()
    first_loss("flow_matching_loss", {**tensors, "pred": tensors["pred"].requires_grad_()}, "cpu")[0].backward()
    assert served == TWO_PASSES


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    tensors = loss_tensors(weighted=False)
    pred = tensors["pred"].requires_grad_()

    def loss(pred):
        return first_loss("flow_matching_loss", {**tensors, "pred": pred * 1}, "cpu")[0]

    checkpoint(loss, pred, use_reentrant=reentrant).backward()
    assert torch.equal(pred.grad, in_two_passes("flow_matching_loss", tensors, 1.0, "cpu")[1])


def test_the_kept_gradient_goes_with_the_graph():
    """No reference cycle keeps it, whether the backward runs or not."""
    tensors = loss_tensors()
    pred = tensors["pred"].requires_grad_()
    gc.disable()
    try:
        for run in (True, False):
            loss = first_loss("flow_matching_loss", {**tensors, "pred": pred}, "cpu")[0]
            gradient = weakref.ref(loss.grad_fn.gradient)  # which is saved nowhere else
            assert gradient() is not None
            if run:
                torch.autograd.grad(loss, pred)
            del loss
            assert gradient() is None
    finally:
        gc.enable()


def test_backwards_of_several_threads():
    """Of one graph: the kept gradient is handed to one of them."""
    tensors = loss_tensors((2, 64, 64))
    _, expected = in_two_passes("flow_matching_loss", tensors, 1.0, "cpu")
    pred = tensors["pred"].requires_grad_()
    loss, _ = first_loss("flow_matching_loss", {**tensors, "pred": pred}, "cpu")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, pred, retain_graph=True)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({gradient.data_ptr() for gradient in found}) == 4
    assert all(torch.equal(gradient, expected) for gradient in found)


@each_implementation
def test_an_empty_batch_has_an_empty_gradient(implementation):
    tensors = loss_tensors((0, 16, 16))
    pred = tensors["pred"].requires_grad_()
    loss, losses = first_loss("flow_matching_loss", tensors, implementation)
    loss.backward()
    assert pred.grad.shape == pred.shape and not any(map(torch.count_nonzero, losses))


@each_loss
def test_opcheck_of_the_operators_of_one_pass(loss):
    """Schemas, fake tensors and what is changed in place."""
    arguments = operator_arguments(loss, "cpu")
    library = torch.ops.deco_kernels
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(library, f"{loss}_with_gradient").default, arguments, test_utils=tests)
    for factor in (1.0, 0.3):
        kept = (torch.randn_like(arguments[0]), torch.tensor(factor), *arguments)
        torch.library.opcheck(getattr(library, f"{loss}_kept_backward").default, kept, test_utils=tests)


def operator_arguments(loss, backend):
    options = (1.0,) if loss == "flow_matching_loss" else ()
    return (*loss_tensors().values(), *options, backend)


@each_loss
def test_the_operators_of_one_pass_refuse_what_they_cannot_do(loss):
    library, one = torch.ops.deco_kernels, torch.ones(())
    with_gradient, kept_backward = (getattr(library, f"{loss}_{end}") for end in ("with_gradient", "kept_backward"))
    arguments = operator_arguments(loss, "reference")
    with pytest.raises(RuntimeError, match=f"{loss}_with_gradient: the backend computes .* in a second pass; call"):
        with_gradient(*arguments)
    with pytest.raises(RuntimeError, match=f"{loss}_kept_backward: the backend"):
        kept_backward(torch.empty_like(arguments[0]), one, *arguments)
    arguments = operator_arguments(loss, "cpu")
    pred = arguments[0]
    for wrong in (pred[..., 1:].clone(), pred.double(), pred.mT.contiguous().mT):
        with pytest.raises(ValueError, match=f"{loss}_kept_backward: gradient: expected the result of"):
            kept_backward(wrong, one, *arguments)


@pytest.mark.parametrize("missing", ["forward_with_gradient", "kept_backward", "keeps_gradient"])
def test_a_backend_without_functions_of_one_pass(missing, served, monkeypatch):
    """Such as one that a user registers."""
    tensors = loss_tensors()
    expected = in_two_passes("flow_matching_loss", tensors, 1.0, "cpu")[1]
    monkeypatch.delattr(flow_matching_loss, missing)
    served.clear()
    pred = tensors["pred"].requires_grad_()
    first_loss("flow_matching_loss", tensors, "cpu")[0].backward()
    assert served == TWO_PASSES and torch.equal(pred.grad, expected)


@each_implementation
def test_nan_and_infinity_with_frequency_loss(implementation):
    """0 times an infinite pixel is no NaN in the gradient of another block."""
    tensors = loss_tensors((1, 16, 16), weighted=False)
    tensors["pred"][0, 0, 0, 0] = float("inf")
    _, expected = in_two_passes("frequency_loss", tensors, 1.0, implementation)
    pred = tensors["pred"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(first_loss("frequency_loss", {**tensors, "pred": pred}, implementation)[0], pred)
    assert torch.equal(gradient.isfinite(), expected.isfinite()) and gradient.isfinite().any()
