"""convert.py: every direction, output, exit statuses, and that bad input leaves no files."""

import os

import pytest
import torch

import convert
from deco_kernels import model
from tests.model.test_checkpoint_file import Options, published_file, same_bits
from tests.random_models import random_model


def test_published_to_safetensors_to_own_form_and_back(tmp_path, capsys):
    source, middle, own, back = (tmp_path / name for name in ("a.ckpt", "b.safetensors", "c.safetensors", "d.ckpt"))
    state = published_file(source)
    for weights, prefix in (("raw", "denoiser."), ("ema", "ema_denoiser.")):
        expected = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        options = ["--names", "published", "--overwrite"]
        assert convert.main([str(source), str(middle), "--weights", weights, *options]) == 0
        assert convert.main([str(middle), str(own), "--overwrite"]) == 0
        assert convert.main([str(own), str(back), *options]) == 0
        same_bits(model.read_checkpoint(back).tensors, expected)
    said = capsys.readouterr().out
    assert "raw weights" in said and "ema weights" in said and "alignment head" in said and "model: DeCo(" in said


def test_everything_is_kept_on_request(tmp_path):
    source, middle, back = (tmp_path / name for name in ("a.ckpt", "b.safetensors", "c.pt"))
    state = published_file(source)
    assert convert.main([str(source), str(middle), "--weights", "all"]) == 0
    assert convert.main([str(middle), str(back), "--weights", "all"]) == 0
    same_bits(model.read_checkpoint(back).tensors, state)


def test_without_output_it_only_describes(tmp_path, capsys):
    source = tmp_path / "a.ckpt"
    published_file(source)
    assert convert.main([str(source)]) == 0
    assert "not read: epoch (int), optimizer_states (list)" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_global_is_admitted_on_request(tmp_path, capsys):
    source, name = tmp_path / "a.ckpt", f"{Options.__module__}.Options"
    published_file(source, options=Options())
    assert convert.main([str(source)]) == 2
    assert f"--allow-global {name}" in capsys.readouterr().err
    assert convert.main([str(source), "--allow-global", name]) == 0


def failing(tmp_path):
    """Arguments (within tmp_path) and expected messages."""
    published_file(tmp_path / "a.ckpt")
    model.save_model(random_model(), tmp_path / "own.safetensors")
    model.save_model(random_model(), tmp_path / "raw.safetensors", names="published", weights="raw")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:5000])
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, tmp_path / "vae.ckpt")
    return [
        (["absent.ckpt", "out.ckpt"], "absent.ckpt: expected a checkpoint file, found nothing; check the path"),
        (["cut.ckpt", "out.ckpt"], "truncated or damaged"),
        (["vae.ckpt", "out.ckpt"], "expected a published DeCo"),
        (["a.ckpt", "out.bin"], "expected a name with suffix"),
        (["a.ckpt", "own.safetensors"], "exists; choose another name"),
        (["raw.safetensors", "out.ckpt", "--weights", "ema"], "expected ema weights, found raw weights only"),
        (["own.safetensors", "out.ckpt", "--weights", "all"], "--weights all keeps published names"),
        (["a.ckpt", "out.ckpt", "--weights", "all", "--names", "deco_kernels"], "--weights all keeps published names"),
        (["a.ckpt", "absent/out.ckpt"], "cannot be written"),
    ]


def test_bad_input_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = failing(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in cases:
        assert convert.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said, said
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, arguments


@pytest.mark.parametrize("arguments", [["a.ckpt", "b.ckpt", "--weights", "best"], ["a", "b", "--names", "x"], []])
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        convert.main(arguments)
    assert stopped.value.code == 2
