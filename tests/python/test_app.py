"""The page: outputs for a sample, errors, and a run in a headless browser."""

import dataclasses
import math
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

import app
from deco_kernels import flow, model
from deco_kernels.training.images import to_pixels
from sampling import inputs
from sampling.page import Painter
from tests.installed import installed
from tests.random_models import random_model

PROGRAMS = Path(__file__).resolve().parents[2] / "python"

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("app") / "tiny.safetensors"
    model.save_model(random_model(num_classes=3), path)
    return path


@pytest.fixture
def painter(checkpoint):
    installed("gradio")
    return app.painter_of(app.parse([str(checkpoint), "--size", "32x48", "--device", "cpu"]))


def test_a_sample_is_that_of_the_solver(painter):
    shown = painter(2, 9, 1.5, 4)
    noise = inputs.noise_of(0, 4, (32, 48))[None]
    label, null = torch.tensor([2]), torch.tensor([3])
    expected = flow.sample(painter.network, noise, label, null, steps=9, guidance=1.5, **painter.settings)[0]
    pixels = ((expected.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert (shown.image == pixels).all() and shown.image.std() > 5
    assert len(shown.frames) == 8 and (shown.frames[-1][0] == pixels).all()
    captions = [caption for _, caption in shown.frames]
    assert captions[0] == "step 0, t = 0.00" and captions[-1] == "step 9, t = 1.00"
    assert [line.get_label() for line in shown.spectrum.axes[0].lines] == captions


@pytest.mark.parametrize(("trunk_steps", "encoded"), [(1, 1), (250, 3)])
def test_trunk_steps_of_the_slider(painter, trunk_steps, encoded):
    """A slider at or beyond the number of steps is the exact sample."""
    shown, exact = painter(2, 3, 1.5, 4, trunk_steps), painter(2, 3, 1.5, 4)
    sampler = flow.Sampler(painter.network, steps=3, guidance=1.5, trunk_steps=encoded, **painter.settings)
    expected = sampler(inputs.noise_of(0, 4, (32, 48))[None], torch.tensor([2]), torch.tensor([3]))
    assert (shown.image == to_pixels(expected)[0]).all()
    assert (shown.image == exact.image).all() == (encoded == 3)


def test_a_model_without_two_halves_has_no_slider_of_trunk_steps(painter):
    shown = dataclasses.replace(painter, network=random_model("dit-tiny", num_classes=3))
    sliders = {block.label: block for block in app.build(shown).blocks.values() if hasattr(block, "label")}
    assert not sliders["Trunk steps"].visible and sliders["Trunk steps"].value == 250
    assert shown(2, 3, 1.5, 4, 250).image.std() > 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 2, 1.0, 0, 0), "trunk steps: expected an integer of at least 1, got 0"),
        ((3, 2, 1.0, 0), "class: expected 0 to 2, got 3"),
        ((-1, 2, 1.0, 0), "class: expected an integer of at least 0"),
        ((0, 0, 1.0, 0), "steps: expected an integer of at least 1"),
        ((0, 2, 1.0, 0.5), "seed: expected an integer of at least 0"),
        ((None, 2, 1.0, 0), "class: expected an integer"),
        ((0, 2, 1.0, math.inf), "seed: expected an integer of at least 0, got inf"),
        ((0, "2", 1.0, 0), "steps: expected an integer of at least 1, got '2'"),
        ((0, 2, None, 0), "guidance: expected a number, got None"),
        ((0, 2, math.nan, 0), "guidance: expected a number, got nan"),
        ((0, 2, 1e39, 0), "the sample is not finite"),
    ],
)
def test_wrong_fields_are_named(painter, values, message):
    with pytest.raises(ValueError, match=message):
        painter(*values)


class LengthEncoder(torch.nn.Module):
    """Features that depend only on the length of the prompt; a token is a word."""

    empty_prompt, max_length = torch.zeros(7, 20), 7

    def tokenizer(self, prompts):
        return {"input_ids": [prompt.split() for prompt in prompts]}

    def forward(self, prompts):
        return torch.stack([torch.full((7, 20), len(prompt) / 10) for prompt in prompts])


def test_prompts_for_a_text_model():
    installed("gradio")
    network = random_model("deco-text-tiny").eval().requires_grad_(False)
    conditioner = inputs.Conditioner(network, torch.device("cpu"), LengthEncoder())
    settings = dict(solver="adams2", guidance_interval=(0.0, 1.0), shift=3.0)
    painter = Painter(network, conditioner, 25, 4.0, settings, (32, 32))
    short, long = (painter(prompt, 3, 2.0, 0) for prompt in ("a hill", "a hill behind a lake"))
    assert (short.image != long.image).any() and len(short.frames) == 4
    with pytest.raises(ValueError, match="prompt: expected text"):
        painter(" ", 3, 2.0, 0)
    with pytest.raises(ValueError, match="prompt 'a a a a a a a a': expected at most 7 tokens, got 8; shorten it"):
        painter("a a a a a a a a", 3, 2.0, 0)
    fields = {block.label: block for block in app.build(painter).blocks.values() if hasattr(block, "label")}
    assert "Prompt" in fields and "Seed" in fields and fields["Trunk steps"].visible


def test_too_little_memory_is_said_on_the_page(painter, monkeypatch):
    gradio = installed("gradio")

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(flow.Sampler, "__call__", fail)
    sample = next(function for function in app.build(painter).fns.values() if function.api_name == "sample").fn
    with pytest.raises(gradio.Error, match="does not fit into memory; serve with a smaller --size"):
        sample(0, 2, 1.0, 0)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        app.main(["--help"])
    assert stopped.value.code == 0 and "CHECKPOINT" in capsys.readouterr().out


def test_without_gradio(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main([str(checkpoint)]) == 2
    assert "error: the page needs gradio" in capsys.readouterr().err


def test_addresses_that_cannot_be_served(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments in (["--port", str(port)], ["--port", "65536"], ["--host", "203.0.113.7"]):
            assert app.main([str(checkpoint), *arguments]) == 2
            said = capsys.readouterr().err
            assert said.startswith("error: --host, --port: cannot serve at ") and said.count("\n") == 1
            assert arguments[1] in said


def test_missing_checkpoint(tmp_path, capsys):
    installed("gradio")
    assert app.main([str(tmp_path / "missing.ckpt")]) == 2
    assert "missing.ckpt" in capsys.readouterr().err


@pytest.fixture
def served(painter):
    page = app.build(painter)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_page_in_a_browser(served):
    """Fills in the fields and presses the button: image, trajectory and spectrum appear; a wrong class is reported."""
    api = installed("playwright.sync_api")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(served, wait_until="domcontentloaded")
        page.get_by_label("Class, 0 to 2").fill("2")
        page.get_by_label("number input for Steps").fill("9")
        page.get_by_label("Seed").fill("4")
        page.get_by_role("button", name="Sample").click()
        page.wait_for_selector("#sample img")
        page.wait_for_selector("#spectrum img")
        page.wait_for_function("document.querySelectorAll('#trajectory button img').length == 8")
        size = page.eval_on_selector(
            "#sample img", "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }"
        )
        assert size == [48, 32]
        assert "step 9, t = 1.00" in page.inner_text("#trajectory")
        page.get_by_label("Class, 0 to 2").fill("7")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("class: expected 0 to 2, got 7").wait_for()
        browser.close()
