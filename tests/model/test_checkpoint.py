"""Published checkpoints: recognition, bit-exact round trips, and errors for checkpoints that do not fit."""

import pytest
import torch

from deco_kernels import model
from tests.golden_files import golden_cases, load_golden
from tests.random_models import random_model

VARIANTS = [
    ("deco-tiny", {}),
    ("deco-tiny", dict(patch_size=8, decoder_width=16, decoder_depth=1, heads=3, num_classes=4)),
    ("deco-tiny", dict(decoder_patch=4, decoder_width=64)),
    ("deco-tiny", dict(decoder_patch=16, depth=3)),
    ("deco-tiny", dict(interaction="add")),
    ("deco-tiny", dict(channels=1, mlp_width=40)),
    ("dit-tiny", dict(patch_size=8)),
    ("deco-text-tiny", {}),
    ("deco-text-tiny", dict(text_depth=2, text_width=12, text_length=3, mlp_width=40, patch_size=8, decoder_depth=2)),
]

# Each of these keys determines a size: number of classes, text width and text length.
ONLY_WITNESS = ("y_embedder.embedding_table.weight", "y_embedder.proj.weight", "y_pos_embedding")


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(actual[k].dtype == v.dtype and torch.equal(actual[k], v) for k, v in expected.items())


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, ("deco-tiny", dict(depth=1)), ("dit-tiny", dict(depth=11))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_recognizes_every_size(name, options, dtype):
    net = random_model(name, **options).to(dtype)
    published = {key: value.clone() for key, value in model.to_published(net).items()}
    again = model.from_published(published)
    sizes = {**net.config, "mlp_width": net.trunk.blocks[0].mlp.w2.in_features}
    assert type(again) is type(net) and again.config == sizes
    assert_same(again.state_dict(), net.state_dict())
    assert_same(model.to_published(again), published)
    if hasattr(net, "decoder"):
        fresh = model.build(name, **options)
        assert torch.equal(again.decoder.position_features, fresh.decoder.position_features)


@pytest.mark.parametrize("path", [*golden_cases("c2i_*"), *golden_cases("t2i_*"), *golden_cases("baseline_*")])
def test_golden_round_trip(path):
    state = load_golden(path).group("state")
    assert_same(model.to_published(model.from_published(state)), state)


def test_model_owns_its_tensors():
    published = model.to_published(random_model())
    kept = {key: value.clone() for key, value in published.items()}
    again = model.from_published(published)
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert_same(published, kept)


def test_prefixes_of_a_training_file():
    raw, averaged = random_model(seed=1), random_model(seed=2)
    head = {f"diffusion_trainer.proj.0.{i}.weight": torch.zeros(2, 2) for i in (0, 2, 4)}
    file = {
        "epoch": 3,
        "state_dict": {**model.to_published(raw, "denoiser."), **model.to_published(averaged, "ema_denoiser."), **head},
    }
    assert_same(model.from_published(file).state_dict(), averaged.state_dict())
    assert_same(model.from_published(file, ema=False).state_dict(), raw.state_dict())
    only_raw = model.to_published(raw, "denoiser.")
    assert_same(model.from_published(only_raw).state_dict(), raw.state_dict())
    only_averaged = model.to_published(averaged, "ema_denoiser.")
    assert_same(model.from_published(only_averaged, ema=False).state_dict(), averaged.state_dict())


@pytest.mark.parametrize(("name", "options"), [("deco-tiny", {}), ("dit-tiny", {})])
def test_every_difference_is_listed(name, options):
    state = model.to_published(random_model(name, **options))
    lost = ["blocks.0.attn.q_norm.weight", "t_embedder.mlp.2.weight", "blocks.1.mlp.w2.weight"]
    for key in lost:
        del state[key]
    state["blocks.1.attn.proj.bias"] = torch.zeros(7)
    state["blocks.0.norm1.weight"] = torch.zeros(24, 1)
    state["blocks.77.norm1.weight"] = torch.zeros(24)
    state["vae.weight"] = torch.zeros(2)
    with pytest.raises(ValueError) as caught:
        model.from_published(state)
    message = str(caught.value)
    assert sorted(line.split()[1] for line in message.splitlines() if "missing:" in line) == sorted(lost)
    assert "extra: blocks.77.norm1.weight [24]" in message and "extra: vae.weight [2]" in message
    assert "misshapen: blocks.1.attn.proj.bias, expected [24], got [7]" in message
    assert "misshapen: blocks.0.norm1.weight, expected [24], got [24, 1]" in message
    assert len(message.splitlines()) == 1 + 7


def assert_only_named(key, error):
    """The error lists one difference, that of the key."""
    (difference,) = str(error).splitlines()[1:]
    assert key in difference


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_any_single_damage_names_the_key(variant):
    """Each key in turn is removed or reshaped, in the first variant of a class both: the error names exactly it."""
    name, options = VARIANTS[variant]
    first = variant == [each for each, _ in VARIANTS].index(name)
    state = model.to_published(model.build(name, **options))
    for number, (key, value) in enumerate(state.items()):
        if key in ONLY_WITNESS:
            continue
        removed = {k: v for k, v in state.items() if k != key}
        reshaped = {**state, key: torch.cat((value, value[:1]))}
        for damaged in (removed, reshaped) if first else ((removed, reshaped)[(number + variant) % 2],):
            with pytest.raises(ValueError, match="state_dict") as caught:
                model.from_published(damaged)
            assert_only_named(key, caught.value)


@pytest.mark.parametrize(
    ("name", "key", "size"),
    [
        ("deco-tiny", "y_embedder.embedding_table.weight", "number of classes"),
        ("deco-text-tiny", "y_embedder.proj.weight", "width of the text features"),
        ("deco-text-tiny", "y_pos_embedding", "length of the text"),
    ],
)
def test_a_size_nothing_shows(name, key, size):
    state = model.to_published(model.build(name))
    del state[key]
    with pytest.raises(ValueError, match=f"cannot infer the {size}: none of {key}"):
        model.from_published(state)


def test_class_and_text_checkpoints_are_not_confused():
    """Either kind with one part of the other: the error names the foreign key."""
    class_state, text_state = (model.to_published(model.build(name)) for name in ("deco-tiny", "deco-text-tiny"))
    with pytest.raises(ValueError, match="extra: y_embedder.embedding_table.weight"):
        model.from_published({**text_state, "y_embedder.embedding_table.weight": torch.zeros(11, 24)})
    with pytest.raises(ValueError, match="cannot infer the number of blocks: no key starts with text_refine_blocks"):
        model.from_published({**class_state, "y_pos_embedding": torch.zeros(1, 7, 24)})


def test_other_things_are_refused():
    with pytest.raises(ValueError, match=r"expected a published DeCo .* got layer1.weight"):
        model.from_published({"layer1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="got no keys"):
        model.from_published({})
    with pytest.raises(TypeError, match="expected a mapping"):
        model.from_published([torch.zeros(3)])
    with pytest.raises(TypeError, match=r"expected dense tensors of .*, got 'step' \(int\), 'n' \(int64\)"):
        model.from_published({"step": 3, "n": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(TypeError, match="expected DeCo, DeCoTextToImage or DiT, got Linear"):
        model.to_published(torch.nn.Linear(2, 2))
