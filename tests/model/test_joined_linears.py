"""join_linears: one matmul for linears of one input, with the same results, parameters and memory."""

import copy
import pickle

import pytest
import torch

from deco_kernels import flow
from deco_kernels.model.dit import JoinedRows, SwiGLU
from tests.golden_files import relative_error
from tests.random_models import random_batch, random_model


def joined_and_separate(name: str):
    separate = random_model(name).eval().requires_grad_(False)
    joined = copy.deepcopy(separate)
    joined.trunk.join_linears()
    return joined, separate


def conditions(name: str):
    x, t, y = random_batch()
    return x, t, torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(5)) if "text" in name else y


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny", "deco-text-tiny"])
def test_results_and_parameters_are_the_same(name):
    joined, separate = joined_and_separate(name)
    expected = separate(*conditions(name))
    assert relative_error(joined(*conditions(name)), expected) < 1e-5
    assert joined.state_dict().keys() == separate.state_dict().keys()
    assert all(torch.equal(joined.state_dict()[key], value) for key, value in separate.state_dict().items())


def test_the_matmuls_are_joined(monkeypatch):
    """No linear of a SwiGLU's input and no modulation runs by itself."""
    joined, _ = joined_and_separate("deco-tiny")
    called = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda linear, x: called.append(linear) or forward(linear, x))
    joined(*conditions("deco-tiny"))
    separate = [block.modulation for block in joined.trunk.blocks]
    separate += [
        linear for module in joined.modules() if isinstance(module, SwiGLU) for linear in (module.w1, module.w3)
    ]
    assert called and not {id(linear) for linear in called} & {id(linear) for linear in separate}


@pytest.mark.parametrize(
    ("again", "is_joined"),
    [
        (lambda net: net, True),
        (copy.deepcopy, False),
        (lambda net: pickle.loads(pickle.dumps(net)), False),
        (lambda net: net.double().float(), False),
    ],
    ids=["joined", "copied", "pickled", "converted"],
)
def test_results_follow_changes_of_parameters(again, is_joined):
    joined, separate = joined_and_separate("deco-tiny")
    joined = again(joined)
    assert (joined.trunk.modulation_rows.rows is not None) == is_joined
    before = joined(*conditions("deco-tiny"))
    for net in (joined, separate):
        net.trunk.blocks[-1].modulation.weight.mul_(2)
        net.trunk.blocks[0].mlp.w3.weight.mul_(2)
    after = joined(*conditions("deco-tiny"))
    assert relative_error(after, separate(*conditions("deco-tiny"))) < 1e-5
    assert relative_error(after, before) > 1e-3


class OtherBlock(torch.nn.Module):
    """A user's block, without a modulation and its argument."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, c, rotation):
        return self.block(x, c, rotation)


def test_other_blocks_run_and_stay_separate():
    joined, separate = joined_and_separate("deco-tiny")
    for net in (joined, separate):
        net.trunk.blocks[0] = OtherBlock(net.trunk.blocks[0])
    joined.trunk.modulation_rows.rows = None
    joined.trunk.join_linears()
    assert joined.trunk.modulation_rows.rows is None
    assert relative_error(joined(*conditions("deco-tiny")), separate(*conditions("deco-tiny"))) < 1e-5


def test_weights_are_held_once():
    joined, _ = joined_and_separate("deco-tiny")
    (weight, _), parts = joined.trunk.modulation_rows.rows, [block.modulation.weight for block in joined.trunk.blocks]
    assert {part.untyped_storage().data_ptr() for part in parts} == {weight.untyped_storage().data_ptr()}
    assert sum(part.numel() for part in parts) == weight.numel()


def test_linears_that_are_not_plain_stay_separate():
    net = random_model("deco-tiny").requires_grad_(False)
    seen = []
    net.trunk.blocks[0].mlp.w1.register_forward_hook(lambda *_: seen.append(1))

    class Other(torch.nn.Linear):
        pass

    modulation = net.trunk.blocks[1].modulation
    other = Other(modulation.in_features, modulation.out_features)
    other.load_state_dict(modulation.state_dict())
    net.trunk.blocks[1].modulation = other
    expected = net(*conditions("deco-tiny"))
    net.trunk.join_linears()
    assert net.trunk.modulation_rows.rows is None and net.trunk.blocks[0].mlp.input_rows.rows is None
    assert net.trunk.blocks[1].mlp.input_rows.rows is not None
    assert relative_error(net(*conditions("deco-tiny")), expected) < 1e-5
    assert len(seen) == 2


class OfASubclass(torch.Tensor):
    pass


def with_another_forward(linears):
    forward = linears[1].forward
    linears[1].forward = lambda x: 2 * forward(x)


def with_one_weight(linears):
    linears[1].weight = linears[0].weight


def with_one_bias(linears):
    linears[1].bias = linears[0].bias


def with_another_dtype(linears):
    linears[1].bfloat16()


def with_a_tensor_subclass(linears):
    linears[1].weight = torch.nn.Parameter(linears[1].weight.detach().as_subclass(OfASubclass))


@pytest.mark.parametrize(
    "change", [with_another_forward, with_one_weight, with_one_bias, with_another_dtype, with_a_tensor_subclass]
)
def test_linears_that_cannot_be_rows_of_one_matrix_stay_as_they_are(change):
    linears, rows = [torch.nn.Linear(5, 3) for _ in range(3)], JoinedRows()
    change(linears)
    before = [parameter for linear in linears for parameter in linear.parameters()]
    rows.join(linears)
    assert rows(torch.randn(2, 5)) == ()
    assert all(a is b for a, b in zip(before, (p for linear in linears for p in linear.parameters()), strict=True))


def test_joined_rows_with_and_without_biases():
    for bias in (True, False):
        linears = [torch.nn.Linear(5, 3, bias=bias) for _ in range(3)]
        rows, x = JoinedRows(), torch.randn(2, 5)
        expected = [linear(x) for linear in linears]
        assert rows(x) == ()
        rows.join(linears)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(rows(x), expected, strict=True))
    rows = JoinedRows()
    rows.join([torch.nn.Linear(5, 3), torch.nn.Linear(5, 4)])
    assert rows(x) == ()


def test_a_sampler_on_the_cpu_joins_nothing():
    """Its samples are bit for bit those of the model."""
    assert (
        flow.Sampler(random_model("deco-tiny"), steps=1, dtype=torch.bfloat16).model.trunk.modulation_rows.rows is None
    )
