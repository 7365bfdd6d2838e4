"""spectrum.py: signals and models of known spectrum, recorded signals, table and picture, bad input."""

import csv
import math

import pytest
import torch
from PIL import Image

import spectrum
from deco_kernels import flow, model
from images import spectra
from sampling.spectrum_recorder import SIGNALS, SpectrumRecorder, velocity_and_dit_output
from tests.random_models import random_batch, random_model


def basis(vertical: int, horizontal: int, side: int) -> torch.Tensor:
    """The DCT-II basis function of an 8x8 block, of norm 1, repeated over [side, side]."""
    n = torch.arange(side, dtype=torch.float64) % 8

    def wave(frequency: int) -> torch.Tensor:
        norm = math.sqrt((1 if frequency == 0 else 2) / 8)
        return norm * torch.cos(math.pi * (2 * n + 1) * frequency / 16)

    return wave(vertical)[:, None] * wave(horizontal)


def test_zigzag_is_that_of_jpeg():
    order = spectra.zigzag()
    assert order[:10] == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    assert order[27:30] == [(0, 6), (0, 7), (1, 6)] and order[35:37] == [(7, 0), (7, 1)]
    assert order[-3:] == [(6, 7), (7, 6), (7, 7)] and len(set(order)) == 64


@pytest.mark.parametrize("frequency", [(0, 0), (0, 7), (5, 2), (7, 7)])
def test_a_basis_function_has_one_coefficient(frequency):
    signal = 3 * basis(*frequency, side=32).expand(2, 5, 32, 32)
    expected = torch.zeros(64)
    expected[spectra.zigzag().index(frequency)] = 9
    torch.testing.assert_close(spectra.energies(signal), expected, atol=1e-4, rtol=0)


def test_white_noise_is_flat_and_energy_is_kept():
    """1,536 blocks in 4 channels: the deviation of a mean of n squares of N(0, 1) is sqrt(2/n), about 1.8 %."""
    signal = 2 * torch.randn(6, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    found = spectra.energies(signal)
    assert (found / 4 - 1).abs().max() < 5 * math.sqrt(2 / 6144)
    torch.testing.assert_close(found.mean(), signal.square().mean())


def test_shares_weigh_all_times_alike():
    flat, low = torch.full((64,), 5.0), torch.zeros(64)
    low[0] = 100.0
    found = spectra.shares({0.0: flat, 0.5: low})
    assert found[0].item() == pytest.approx((1 / 64 + 1) / 2) and found[1:].tolist() == pytest.approx([1 / 128] * 63)
    assert spectra.high_share(flat) == pytest.approx(0.5) and spectra.high_share(low) == 0


@pytest.mark.parametrize("options", [{}, {"decoder_patch": 2}, {"save_memory": True}])
def test_dit_output_of_a_deco_lies_on_its_pixel_grid(options):
    """The upsample gives the same basis function for every token and channel; the velocity is unchanged."""
    network = random_model(**options)
    decoder, grid = network.decoder, network.decoder.grid
    with torch.no_grad():
        decoder.up_weight.zero_()
        decoder.up_bias.copy_(basis(2, 5, grid).reshape(-1, 1).expand(-1, decoder.width).reshape(-1))
    x, t, y = random_batch(height=64, width=48)
    with torch.no_grad():
        velocity, dit_output = velocity_and_dit_output(network, x, t, y)
        assert torch.equal(velocity, network(x, t, y))
    side = 16 // decoder.decoder_patch
    assert dit_output.shape == (2, decoder.width, 4 * side, 3 * side)
    energy = spectra.energies(dit_output)
    assert energy[spectra.zigzag().index((2, 5))].item() == pytest.approx(1, rel=1e-5)
    assert energy.sum().item() == pytest.approx(1, rel=1e-5)


def test_dit_output_of_the_plain_dit_is_the_velocity():
    network = random_model("dit-tiny")
    x, t, y = random_batch()
    with torch.no_grad():
        velocity, dit_output = velocity_and_dit_output(network, x, t, y)
        assert torch.equal(velocity, network(x, t, y)) and torch.equal(velocity, dit_output)


def test_recorded_are_conditional_velocities_along_the_samples():
    """With guidance and batches of unequal size; the states are those of flow.sample."""
    network = random_model("dit-tiny")
    noise, _, y = random_batch(batch=3)
    null, settings = torch.full_like(y, network.null_label), dict(steps=4, guidance=3.0)
    recorder = SpectrumRecorder(network)
    for part in (slice(0, 2), slice(2, 3)):
        recorder.sample(noise[part], y[part], null[part], **settings)
    _, states = flow.sample(network, noise, y, null, **settings, trajectory=True)
    found = recorder.spectra()["velocity"]
    assert list(found) == flow.timesteps(4)[:-1].tolist()
    for (time, energy), state in zip(found.items(), states, strict=False):
        with torch.no_grad():
            velocity = network(state, torch.full((3,), time), y)
        torch.testing.assert_close(energy.float(), spectra.energies(velocity), rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("spectrum")
    for name in ("deco-tiny", "dit-tiny"):
        model.save_model(random_model(name), folder / f"{name}.safetensors")
    return [str(folder / "deco-tiny.safetensors"), str(folder / "dit-tiny.safetensors")]


def test_table_and_picture(two_checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--size", "32x48", "--steps", "3", "--count", "3", "--batch", "2", "--out", str(out)]
    assert spectrum.main([*two_checkpoints, "--name", "DeCo", "--name", "DiT", *options]) == 0
    assert "DiT: energy in the upper half of the coefficients: output of the DiT" in capsys.readouterr().out
    with open(out / "spectrum.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 64
    for name, signal in (("DeCo", "dit_output"), ("DeCo", "velocity"), ("DiT", "velocity")):
        chosen = [row for row in rows if row["model"] == name and row["signal"] == signal and row["time"] == "0"]
        assert [int(row["zigzag"]) for row in chosen] == list(range(64))
        assert sum(float(row["share"]) for row in chosen) == pytest.approx(1, abs=1e-4)
    same = [[row["energy"] for row in rows if row["model"] == "DiT" and row["signal"] == s] for s in SIGNALS]
    assert same[0] == same[1]
    with Image.open(out / "spectrum.png") as picture:
        assert picture.width == 900
    before = (out / "spectrum.csv").read_bytes()
    assert spectrum.main([*two_checkpoints, *options]) == 2
    assert "spectrum.csv exists; choose another folder" in capsys.readouterr().err
    assert (out / "spectrum.csv").read_bytes() == before


def test_mistakes_are_named_before_anything_is_measured(two_checkpoints, tmp_path, monkeypatch, capsys):
    """Mistakes in the folder, in settings, and for the second model, which has fewer classes than the first."""
    monkeypatch.setattr(spectrum, "measure", lambda *_: pytest.fail("a model was measured"))
    model.save_model(random_model("dit-tiny", num_classes=2), tmp_path / "few.safetensors")
    (tmp_path / "file").write_text("mine")
    few, out = str(tmp_path / "few.safetensors"), str(tmp_path / "out")
    for arguments, said in (
        ([two_checkpoints[0], few, "--classes", "5", "--out", out], "--classes: expected classes from 0 to 1"),
        ([two_checkpoints[0], "--shift", "0", "--out", out], "shift: expected a positive"),
        ([two_checkpoints[0], "--out", str(tmp_path / "file")], "file"),
    ):
        assert spectrum.main([*arguments, "--size", "32"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_energies_that_are_not_finite_are_refused(tmp_path, capsys):
    network = random_model()
    with torch.no_grad():
        network.decoder.head_bias[0] = math.nan
    model.save_model(network, tmp_path / "corrupted.safetensors")
    options = ["--name", "DeCo", "--out", str(tmp_path / "out"), "--size", "32", "--steps", "1", "--count", "1"]
    assert spectrum.main([str(tmp_path / "corrupted.safetensors"), *options]) == 2
    assert "error: DeCo: expected finite energies, got infinity or NaN" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_checkpoint_is_an_error(tmp_path, capsys):
    assert spectrum.main([str(tmp_path / "absent.ckpt"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "checkpoints",
    [
        [],
        ["a", "b", "c"],
        ["a", "a"],
        ["a", "--name", "x", "--name", "y"],
        ["a", "b", *["--name", "x"] * 2, "--name", "y"],
    ],
)
def test_bad_options(checkpoints):
    with pytest.raises(SystemExit) as stopped:
        spectrum.main([*checkpoints, "--out", "out"])
    assert stopped.value.code == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        spectrum.main(["--help"])
    assert stopped.value.code == 0 and "--guidance" in capsys.readouterr().out
