"""Qwen3TextEncoder: features vs. direct calls of the language model, widths, the empty prompt, errors."""

import json
import shutil
import sys

import pytest
import torch

from deco_kernels import model
from tests.installed import installed
from tests.tiny_qwen3 import HIDDEN, save_tiny_qwen3

transformers = installed("transformers")
PROMPTS = ["a red cat", "the sea", "a mat on the blue sea"]


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory):
    return save_tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def encoder(tiny_qwen3):
    return model.Qwen3TextEncoder(tiny_qwen3, max_length=12, width=HIDDEN, dtype=torch.float32)


def test_features_are_the_last_hidden_states(encoder, tiny_qwen3):
    """Attention is causal: up to its length, a prompt has the same features as without padding."""
    features = encoder(PROMPTS)
    assert features.shape == (3, 12, HIDDEN) and features.dtype == torch.float32 and not features.requires_grad
    language_model = transformers.Qwen3Model.from_pretrained(tiny_qwen3, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen3)
    for prompt, row in zip(PROMPTS, features, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = language_model(ids).last_hidden_state[0]
        assert 1 < len(expected) < 12
        torch.testing.assert_close(row[: len(expected)], expected)
        assert row[len(expected) :].any(dim=1).all()
    torch.testing.assert_close(encoder(PROMPTS[1])[0], features[1])


@pytest.mark.parametrize("width", [HIDDEN - 8, HIDDEN + 12])
def test_width_is_cut_or_filled_with_zeros(encoder, tiny_qwen3, width):
    other = model.Qwen3TextEncoder(tiny_qwen3, max_length=12, width=width, dtype=torch.float32)
    features, expected = other(PROMPTS), encoder(PROMPTS)
    common = min(width, HIDDEN)
    assert features.shape == (3, 12, width) and torch.equal(features[..., :common], expected[..., :common])
    assert not features[..., common:].any() and other.empty_prompt.shape == (12, width)


def test_empty_prompt_is_computed_once(encoder, tiny_qwen3):
    other = model.Qwen3TextEncoder(tiny_qwen3, max_length=12, width=HIDDEN, dtype=torch.float32)
    calls = []
    other.model.register_forward_hook(lambda *_: calls.append(1))
    first = other.empty_prompt
    assert first.shape == (12, HIDDEN) and first.isfinite().all() and first.any()
    assert other.empty_prompt is first and len(calls) == 1
    assert torch.equal(first, encoder.empty_prompt)
    assert not torch.allclose(first, encoder(PROMPTS)[0])
    assert other.to(torch.bfloat16).empty_prompt.dtype == torch.bfloat16 and len(calls) == 1


def test_features_fit_the_model(encoder):
    net = model.build("deco-text-tiny", text_length=12, text_width=HIDDEN)
    assert net(torch.randn(3, 3, 16, 16), torch.rand(3), encoder(PROMPTS)).shape == (3, 3, 16, 16)


def test_default_dtype_is_bfloat16_and_frozen(tiny_qwen3):
    encoder = model.Qwen3TextEncoder(tiny_qwen3, max_length=5, width=HIDDEN)
    assert encoder("the sea").dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts: expected at least one"),
        ("", ValueError, "empty_prompt"),
        (["a cat", " \n"], ValueError, r"prompts\[1\]: expected text, got ' \\n'; the null condition is empty_prompt"),
        (["a cat", 3], TypeError, r"prompts\[1\]: expected a string, got int"),
        (["a cat", "xyz " * 12], ValueError, r"prompts\[1\]: expected at most 12 tokens, got \d+; shorten it or use"),
    ],
)
def test_bad_prompts(encoder, prompts, error, message):
    with pytest.raises(error, match=message):
        encoder(prompts)


def test_long_prompts_are_cut_on_request(encoder, tiny_qwen3):
    cutting = model.Qwen3TextEncoder(tiny_qwen3, max_length=3, width=HIDDEN, dtype=torch.float32, truncate=True)
    torch.testing.assert_close(cutting(PROMPTS[2:])[0], encoder(PROMPTS[2:])[0, :3])


def test_bad_sizes(tiny_qwen3):
    for options, message in (
        (dict(max_length=0), "max_length: expected at least 1"),
        (dict(width=0), "width: expected at least 1"),
        (dict(max_length=65), "max_length: expected at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            model.Qwen3TextEncoder(tiny_qwen3, **options)
    with pytest.raises(TypeError, match=r"width: expected an int, got 20.0 \(float\); pass an integer"):
        model.Qwen3TextEncoder(tiny_qwen3, width=20.0)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs the package transformers: pip install 'deco_kernels\[text\]'"):
        model.Qwen3TextEncoder("anything")


def test_what_cannot_be_loaded(monkeypatch, tmp_path, tiny_qwen3):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/such-a-model", tmp_path / "missing", tmp_path):
        with pytest.raises(OSError, match=f"path_or_id: expected a folder with config.*{name}"):
            model.Qwen3TextEncoder(name)
    without_weights = shutil.copytree(tiny_qwen3, tmp_path / "without_weights")
    (without_weights / "model.safetensors").unlink()
    with pytest.raises(OSError, match="path_or_id: expected a folder"):
        model.Qwen3TextEncoder(without_weights)


def test_other_models_are_refused(tmp_path, tiny_qwen3):
    def with_config(name, **changes):
        folder = shutil.copytree(tiny_qwen3, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    with pytest.raises(ValueError, match="expected a model of type 'qwen3', got .* of type 'llama'"):
        model.Qwen3TextEncoder(with_config("llama", model_type="llama"))
    with pytest.raises(ValueError, match="has no matching weights for .*layers.2"):
        model.Qwen3TextEncoder(with_config("deeper", num_hidden_layers=3, layer_types=["full_attention"] * 3))
