"""Folders of models: config.json and model.safetensors, through huggingface_hub's mixin."""

import json

import pytest
import torch

from deco_kernels import model
from tests.random_models import random_batch, random_model


@pytest.mark.parametrize("name", ["deco-tiny", "deco-text-tiny", "dit-tiny"])
def test_saved_and_loaded_with_the_same_bits(name, tmp_path):
    net = random_model(name)
    net.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text()) == net.config
    loaded = type(net).from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(net) and loaded.config == net.config and not loaded.training
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in loaded.state_dict().items())
    again = model.load_model(tmp_path / "saved/model.safetensors")
    assert again.config == net.config
    card = (tmp_path / "saved/README.md").read_text()
    assert "library_name: deco_kernels" in card and "pytorch_model_hub_mixin" in card


def test_config_json_decides(tmp_path):
    """Its arguments that do not change the tensors can be edited."""
    net = random_model("deco-tiny")
    net.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**net.config, "backend": "reference"}))
    loaded = model.DeCo.from_pretrained(tmp_path)
    assert loaded.config["backend"] == "reference"
    with torch.no_grad():
        assert loaded(*random_batch()).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected a JSON object, the constructor arguments of a DeCo"),
        ("not JSON", "expected a JSON object, the constructor arguments of a DeCo"),
        ({"width": 24}, "DeCo cannot be built from"),
        ({"depth": 3}, "config: depth: expected 2, the number of blocks with tensors, got 3"),
        ({"decoder_width": 16}, "misshapen: decoder.embed_weight"),
    ],
)
def test_a_config_that_does_not_fit(config, message, tmp_path):
    net = random_model("deco-tiny")
    net.save_pretrained(tmp_path)
    if isinstance(config, dict) and "width" not in config:
        config = {**net.config, **config}
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message):
        model.DeCo.from_pretrained(tmp_path)


def test_another_class_is_named(tmp_path):
    random_model("dit-tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a DeCo, got a DiT; use DiT.from_pretrained"):
        model.DeCo.from_pretrained(tmp_path)


def test_missing_files_and_unknown_options_are_named(tmp_path):
    with pytest.raises(TypeError, match="from_pretrained: expected options among .*, got torch_dtype; leave"):
        model.DeCo.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with pytest.raises(FileNotFoundError, match="config.json: expected a file of a saved DeCo"):
        model.DeCo.from_pretrained(tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    from deco_kernels.model import hub

    def unreachable(*_, **__):
        raise hub.HTTPError("[Errno -2] Name or service not known\nmore lines")

    for name in ("create_repo", "snapshot_download"):
        owner = hub.HfApi if name == "create_repo" else hub
        monkeypatch.setattr(owner, name, unreachable)
    calls = [
        lambda: model.DeCo.from_pretrained("nobody/nothing"),
        lambda: random_model().push_to_hub("nobody/nothing"),
        lambda: random_model().save_pretrained(tmp_path, push_to_hub=True, repo_id="nobody/nothing"),
    ]
    for call in calls:
        with pytest.raises(OSError, match="nobody/nothing.*Name or service not known.*without a connection") as said:
            call()
        assert "\n" not in str(said.value)


def test_an_id_that_is_no_id():
    with pytest.raises(OSError, match=r"path_or_id: expected a folder.*got 'a/b/c'"):
        model.DeCo.from_pretrained("a/b/c")
