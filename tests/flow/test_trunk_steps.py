"""Sampling with the trunk at some steps only, and the choice of these steps."""

import itertools
import json

import pytest
import torch

from deco_kernels import flow
from deco_kernels.flow.cuda_graphs import GraphedVelocity
from deco_kernels.flow.samplers import Halves
from deco_kernels.flow.trunk_steps import best_trunk_steps, resolve_trunk_steps, token_distances
from tests.flow.test_sampler import sampling_case
from tests.random_models import random_batch, random_model

SOLVERS = ["euler", "heun", "heun_exact", "adams2"]
SETTINGS = dict(steps=5, guidance=1.7, guidance_interval=(0.1, 0.7), shift=1.3)
STARTS = flow.timesteps(5, 1.3)[:-1].tolist()


class ListedCalls:
    """The halves of a model; lists the half and the batch of every call, by the time index of SETTINGS."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def encode(self, x, t, y):
        self.calls.append(("encode", STARTS.index(float(t[0])), len(x)))
        return self.model.encode(x, t, y)

    def decode(self, x, t, tokens):
        self.calls.append(("decode", STARTS.index(float(t[0])), len(x)))
        return self.model.decode(x, t, tokens)


# ------------------------------------------------------------------------------------------------------- the two halves


@pytest.mark.parametrize("name", ["deco-tiny", "deco-text-tiny"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_forward_is_decode_after_encode_bit_for_bit(name, dtype):
    net, x, y, _ = sampling_case(name)
    t = torch.rand(len(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        tokens = net.encode(x, t, y)
        assert torch.equal(net.decode(x, t, tokens), net(x, t, y))
    assert tokens.shape == (2, 4, net.trunk.width)


def test_the_halves_take_an_empty_batch():
    net = random_model()
    x, t, y = (each[:0] for each in random_batch())
    assert net.decode(x, t, net.encode(x, t, y)).shape == x.shape


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(tokens=torch.zeros(2, 5, 24)), ValueError, r"tokens: expected shape \(2, 6, 24\) for an image"),
        (dict(tokens=None), TypeError, "tokens: expected a torch.Tensor, got NoneType"),
        (dict(t=torch.zeros(3)), ValueError, r"t: expected shape \(2,\)"),
        (dict(x=torch.zeros(2, 3, 30, 32)), ValueError, "x: expected height and width to be positive multiples"),
        (dict(x=torch.zeros(2, 3, 32, 32).double()), TypeError, "x: expected torch.float32 like the model's"),
    ],
)
def test_decode_refuses_what_does_not_fit(changed, error, message):
    net = random_model()
    x, t, _ = random_batch()
    with pytest.raises(error, match=message):
        net.decode(**dict(x=x, t=t, tokens=torch.zeros(2, 4, net.trunk.width)) | changed)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_every_step_gives_the_bits_of_the_whole_model(solver, guidance):
    net, noise, cond, uncond = sampling_case("deco-tiny")
    settings = SETTINGS | dict(solver=solver, guidance=guidance)
    expected = flow.sample(net, noise, cond, uncond, **settings)
    for trunk_steps in (5, range(5)):
        assert torch.equal(flow.Sampler(net, trunk_steps=trunk_steps, **settings)(noise, cond, uncond), expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_fewer_steps_are_close_and_different(solver):
    """The error of the sample is not 0 and falls with more trunk steps; the trajectory ends in the sample."""
    net, noise, cond, uncond = sampling_case("deco-tiny")
    settings = SETTINGS | dict(solver=solver)
    expected = flow.sample(net, noise, cond, uncond, **settings)
    errors = []
    for trunk_steps in ([0], [0, 2], [0, 1, 2, 3]):
        sampler = flow.Sampler(net, trunk_steps=trunk_steps, **settings)
        final, states = sampler(noise, cond, uncond, trajectory=True)
        assert len(states) == 6 and torch.equal(states[-1], final)
        errors.append(((final - expected).norm() / expected.norm()).item())
    assert errors[0] > errors[2] > 0


def test_calls_of_an_euler_sampler():
    """Steps 1 to 3 are guided. Step 1 has only the conditional tokens of step 0 and encodes the null condition; step 2
    encodes both, step 3 takes both, step 4 takes the conditional ones."""
    net, noise, cond, uncond = sampling_case("deco-tiny")
    model = ListedCalls(net)
    flow.Sampler(model, trunk_steps=[0, 2], **SETTINGS | {"guidance_interval": (0.1, 0.75)})(noise, cond, uncond)
    assert model.calls == [
        ("encode", 0, 2), ("decode", 0, 2),
        ("encode", 1, 2), ("decode", 1, 2), ("decode", 1, 4),
        ("encode", 2, 4), ("decode", 2, 4),
        ("decode", 3, 4),
        ("decode", 4, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("solver", "encoded"), [("heun", [0, 2]), ("heun_exact", [0, 2, 2])])
def test_the_corrector_encodes_by_its_own_time_index(solver, encoded):
    net, noise, cond, _ = sampling_case("deco-tiny")
    model = ListedCalls(net)
    flow.Sampler(model, solver=solver, trunk_steps=[0, 2], steps=5, shift=1.3)(noise, cond)
    assert [index for half, index, _ in model.calls if half == "encode"] == encoded


def test_two_calls_are_captured_and_replayed():
    """With the capture replaced by one that counts: one graph with the trunk, one without, for each batch."""
    net, noise, cond, uncond = sampling_case("deco-tiny")
    sampler = flow.Sampler(net, trunk_steps=2, steps=5, guidance=2.0)
    captured = []

    def capture(call, *arguments):
        captured.append((call.__name__, len(arguments[0])))
        return call

    graphed = Halves(*(GraphedVelocity(half.velocity, capture) for half in sampler.graphed_halves))
    expected = sampler(noise, cond, uncond)
    assert torch.equal(sampler.sample_halves(graphed, noise, cond, uncond), expected)
    assert sorted(captured) == sorted({(name, count) for name, count in captured})
    assert len({name for name, _ in captured}) == 2


# -------------------------------------------------------------------------------------------------- choice of the steps


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_spread_steps_are_even_in_shifted_time(shift):
    times = flow.timesteps(20, shift)
    for count in range(1, 21):
        chosen = resolve_trunk_steps(count, times)
        assert chosen[0] == 0 and len(chosen) == count and sorted(set(chosen)) == chosen and chosen[-1] < 20
    assert resolve_trunk_steps(20, times) == list(range(20))
    for number, step in enumerate(resolve_trunk_steps(4, times)):
        assert abs(times[step] - number / 4) == min(abs(times[:-1] - number / 4))


def test_the_best_steps_are_those_of_an_exhaustive_search():
    distances = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0)

    def total(chosen):
        return sum(distances[max(e for e in chosen if e <= step), step].item() for step in range(7))

    for count in range(1, 8):
        choices = [(0, *later) for later in itertools.combinations(range(1, 7), count - 1)]
        assert best_trunk_steps(distances, count) == list(min(choices, key=total))


def test_distances_compare_token_by_token():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    assert token_distances([a, b]).tolist() == [[0, 0.5], [0.5, 0]]
    assert token_distances([a, b], "l2")[0, 1].item() == pytest.approx(13**0.5 / 3 / 2)
    # A guided step has the null condition first: the last rows are compared.
    assert token_distances([torch.cat((b, a)), a]).tolist() == [[0, 0], [0, 0]]


def test_tokens_that_jump_once_are_encoded_at_the_jump():
    """A model whose tokens change only at step 3: the second of two trunk steps is that one."""

    class Jumping:
        def encode(self, x, t, y):
            return torch.ones(len(x), 4, 8).where(t[:, None, None] < STARTS[3], -torch.ones(8))

        def decode(self, x, t, tokens):
            return torch.zeros_like(x)

    noise, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    assert flow.choose_trunk_steps(Jumping(), noise, labels, steps=5, trunk_steps=2, shift=1.3) == [0, 3]


@pytest.mark.parametrize("measure", ["cosine", "l2"])
def test_chosen_steps_of_a_model_can_be_written_and_read(measure, tmp_path):
    net, noise, cond, uncond = sampling_case("deco-tiny")
    chosen = flow.choose_trunk_steps(net, noise, cond, uncond, trunk_steps=3, measure=measure, **SETTINGS)
    assert len(chosen) == 3 and chosen[0] == 0 and chosen == sorted(set(chosen))
    flow.write_trunk_steps(tmp_path / "chosen.json", chosen, steps=5, solver="euler")
    assert flow.read_trunk_steps(tmp_path / "chosen.json", steps=5) == chosen
    flow.Sampler(net, trunk_steps=chosen, **SETTINGS)(noise, cond, uncond)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("trunk_steps", "error", "message"),
    [
        (0, ValueError, "trunk_steps: expected from 1 to 5, the number of steps, got 0"),
        (6, ValueError, "trunk_steps: expected from 1 to 5, the number of steps, got 6"),
        (2.5, TypeError, "trunk_steps: expected an int or a sequence of ints, got 2.5"),
        (True, TypeError, "trunk_steps: expected an int or a sequence of ints, got True"),
        ("0,2", TypeError, "trunk_steps: expected an int or a sequence of ints, got '0,2'"),
        ([], ValueError, "trunk_steps: expected 0 as the first index"),
        ([1, 2], ValueError, r"trunk_steps: expected 0 as the first index.*got \[1, 2\]"),
        ([0, 3, 2], ValueError, r"trunk_steps: expected increasing indices, got \[0, 3, 2\]"),
        ([0, 5], ValueError, r"trunk_steps: expected indices below 5, the number of steps, got \[0, 5\]"),
    ],
)
def test_bad_trunk_steps_are_refused_at_once(trunk_steps, error, message):
    with pytest.raises(error, match=message):
        flow.Sampler(random_model(), trunk_steps=trunk_steps, **SETTINGS)


def test_a_model_without_halves_is_refused():
    with pytest.raises(TypeError, match="model: expected one with encode and decode, such as DeCo, for trunk_steps"):
        flow.Sampler(random_model("dit-tiny"), steps=5, trunk_steps=2)


def test_a_bad_choice_is_refused(tmp_path):
    net, noise, cond, _ = sampling_case("deco-tiny")
    for options, error, message in (
        (dict(trunk_steps=[0, 1]), TypeError, "trunk_steps: expected an int, got list"),
        (dict(trunk_steps=6), ValueError, "trunk_steps: expected from 1 to 5"),
        (dict(trunk_steps=2, measure="angle"), ValueError, r"measure: expected one of \['cosine', 'l2'\], got 'angle'"),
    ):
        with pytest.raises(error, match=message):
            flow.choose_trunk_steps(net, noise, cond, steps=5, **options)
    file = tmp_path / "chosen.json"
    flow.write_trunk_steps(file, [0, 2], steps=5)
    with pytest.raises(ValueError, match="expected trunk steps chosen for 8 steps, got those for 5"):
        flow.read_trunk_steps(file, steps=8)
    for text in (
        "{",
        "[]",
        json.dumps({"steps": 5}),
        json.dumps({"steps": 5, "trunk_steps": 3}),
        '{"steps": 5, "trunk_steps": [0, 1.5]}',
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected JSON with steps and trunk_steps"):
            flow.read_trunk_steps(file, steps=5)
