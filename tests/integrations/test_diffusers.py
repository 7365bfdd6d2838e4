"""DeCoPipeline: the samples of flow.Sampler, folders without code, published checkpoints, and callbacks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deco_kernels import flow, model
from tests.model.test_checkpoint_file import same_bits
from tests.random_models import random_model
from tests.tiny_qwen3 import HIDDEN, save_tiny_qwen3

SETTINGS = dict(num_inference_steps=3, guidance_scale=1.7, height=32, width=48, output_type="pt")
PROMPT = "a red cat"


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Imports diffusers, which takes seconds, when the first test runs."""
    global DeCoPipeline
    from deco_kernels.integrations.diffusers import DeCoPipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def class_pipeline():
    return quiet(DeCoPipeline(random_model("deco-tiny")))


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory):
    """A text model with a tiny random Qwen3, in bfloat16."""
    encoder = model.Qwen3TextEncoder(save_tiny_qwen3(tmp_path_factory.mktemp("qwen3")), max_length=7, width=HIDDEN)
    return quiet(DeCoPipeline(random_model("deco-text-tiny"), encoder, shift=2.0))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_class_samples_are_those_of_the_sampler(class_pipeline):
    net = class_pipeline.model
    images = class_pipeline(class_labels=[3, 7], generator=seeded(), **SETTINGS).images
    noise = torch.randn(2, 3, 32, 48, generator=seeded())
    options = dict(steps=3, guidance=1.7, guidance_interval=(0.1, 1.0))
    expected = flow.sample(net, noise, torch.tensor([3, 7]), torch.tensor([10, 10]), **options)
    assert torch.equal(images, (expected / 2 + 0.5).clamp(0, 1))
    (again,) = class_pipeline(class_labels=torch.tensor([3, 7]), generator=seeded(), return_dict=False, **SETTINGS)
    assert torch.equal(again, images)


def test_text_samples_are_those_of_the_sampler(text_pipeline):
    net, encoder = text_pipeline.model, text_pipeline.text_encoder
    options = dict(solver="adams2", steps=3, guidance=1.7, guidance_interval=(0.0, 0.8), shift=2.0)
    for negative in (None, "the blue sea"):
        images = text_pipeline(
            PROMPT, negative_prompt=negative, num_images_per_prompt=2, generator=[seeded(1), seeded(2)],
            guidance_interval=(0.0, 0.8), **SETTINGS,
        ).images  # fmt: skip
        noise = torch.cat([torch.randn(1, 3, 32, 48, generator=seeded(seed)) for seed in (1, 2)])
        cond = encoder(PROMPT).expand(2, -1, -1)
        uncond = (encoder(negative) if negative else encoder.empty_prompt).expand_as(cond)
        expected = flow.sample(net, noise, cond, uncond, **options)
        assert torch.equal(images, (expected / 2 + 0.5).clamp(0, 1)), negative


def test_forms_of_the_images(class_pipeline):
    found = {
        form: class_pipeline(class_labels=1, generator=seeded(), **{**SETTINGS, "output_type": form}).images
        for form in ("pt", "np", "pil")
    }
    assert found["np"].shape == (1, 32, 48, 3) and found["pil"][0].size == (48, 32)
    assert np.array_equal(found["np"], found["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(found["pil"][0]), (found["np"][0] * 255).round().astype(np.uint8))


def test_the_papers_settings_are_the_defaults(class_pipeline, text_pipeline, monkeypatch):
    """But for the shift of the text pipeline, which was given."""
    used = []

    def record(model, cuda_graph, **settings):
        used.append(settings)
        return lambda noise, *_, **__: noise

    monkeypatch.setattr(flow, "Sampler", record)
    class_pipeline(class_labels=0)
    text_pipeline(PROMPT, num_inference_steps=7)
    interval = "guidance_interval"
    assert used == [
        {"solver": "euler", "steps": 100, "guidance": 3.2, interval: (0.1, 1.0), "shift": 1.0},
        {"solver": "adams2", "steps": 7, "guidance": 4.0, interval: (0.0, 1.0), "shift": 2.0},
    ]


def test_a_callback_sees_and_replaces_the_state(class_pipeline):
    seen = []

    def callback(pipe, step, time, kwargs):
        assert pipe is class_pipeline
        seen.append((step, float(time)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 2 else kwargs

    images = class_pipeline(class_labels=1, callback_on_step_end=callback, **SETTINGS).images
    assert seen == list(enumerate(flow.timesteps(3)[:-1].tolist()))
    assert (images == 0.5).all()
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs: expected 'latents' or nothing, got"):
        class_pipeline(class_labels=1, callback_on_step_end_tensor_inputs=["prompt_embeds"], **SETTINGS)


def test_dtype_and_device_of_the_components():
    pipeline = quiet(DeCoPipeline(random_model("deco-tiny"))).to(torch.bfloat16)
    assert pipeline.dtype == pipeline.model.dtype == torch.bfloat16 and pipeline.device.type == "cpu"
    assert pipeline(class_labels=1, **SETTINGS).images.isfinite().all()
    assert list(pipeline.components) == ["model", "text_encoder"]


# --- folders ----------------------------------------------------------------------------------------------------------

FRESH_PROCESS = """
import socket, sys
import torch
import deco_kernels
from deco_kernels import flow, model
model.DeCo, model.DeCoTextToImage, flow.Sampler
assert not {"diffusers", "huggingface_hub"} & set(sys.modules)
def refuse(*_): raise AssertionError("no network")
socket.socket.connect = refuse
from deco_kernels.integrations.diffusers import DeCoPipeline
folder, settings = sys.argv[1], eval(sys.argv[2])
images = []
for name, condition in (("class", dict(class_labels=[3, 7])), ("text", dict(prompt="a red cat"))):
    pipeline = DeCoPipeline.from_pretrained(f"{folder}/{name}")
    images.append(pipeline(**condition, generator=torch.Generator().manual_seed(0), **settings).images)
torch.save(images, f"{folder}/images.pt")
"""


def test_saved_and_loaded_in_a_fresh_process_without_network(class_pipeline, text_pipeline, tmp_path):
    expected = [
        class_pipeline(class_labels=[3, 7], generator=seeded(), **SETTINGS).images,
        text_pipeline(PROMPT, generator=seeded(), **SETTINGS).images,
    ]
    for name, pipeline in (("class", class_pipeline), ("text", text_pipeline)):
        pipeline.save_pretrained(tmp_path / name)
        plant_code(tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, tmp_path, repr(SETTINGS)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "3/3" in result.stderr  # the progress bar
    for actual, wanted in zip(torch.load(tmp_path / "images.pt"), expected, strict=True):
        assert torch.equal(actual, wanted)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "ran.txt" not in written and not any(name.endswith((".bin", ".pkl")) for name in written)


def plant_code(folder):
    """Adds code that a loader might run, and names it in the JSON files."""
    code = f"open({str(folder / 'ran.txt')!r}, 'w')\nclass DeCo: pass\nclass DeCoTextToImage: pass\n"
    for name in ("pipeline.py", "model/planted.py", "model/deco_kernels.model.deco.py", "text_encoder/planted.py"):
        if (folder / name).parent.exists():
            (folder / name).write_text(code)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"], index["model"][0] = ["pipeline", "DeCo"], "planted"
    path.write_text(json.dumps(index))
    path = folder / "text_encoder/config.json"
    if path.exists():
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "planted.DeCo"}}))


def test_another_encoder_and_dtype_on_request(text_pipeline, tmp_path):
    text_pipeline.save_pretrained(tmp_path)
    loaded = DeCoPipeline.from_pretrained(tmp_path, text_encoder=text_pipeline.text_encoder, torch_dtype=torch.bfloat16)
    assert loaded.text_encoder is text_pipeline.text_encoder and loaded.model.dtype == torch.bfloat16
    assert loaded.config.shift == 2.0


def test_a_published_checkpoint_in_and_out(tmp_path, text_pipeline):
    for name, encoder in (("deco-tiny", None), ("deco-text-tiny", tmp_path / "encoder")):
        path = tmp_path / f"{name}.ckpt"
        published = model.to_published(random_model(name), "ema_denoiser.")
        torch.save({"state_dict": published}, path)
        if encoder is not None:
            text_pipeline.text_encoder.save_pretrained(encoder)
        pipeline = DeCoPipeline.from_checkpoint(path, text_encoder=encoder, solver="heun")
        assert pipeline.config.solver == "heun"
        pipeline.save_pretrained(tmp_path / name)
        again = DeCoPipeline.from_pretrained(tmp_path / name)
        model.save_model(again.model, tmp_path / "again.ckpt", names="published", overwrite=True)
        same_bits(model.read_checkpoint(tmp_path / "again.ckpt").tensors, published)


def test_the_blocks_of_the_walkthrough(tmp_path, monkeypatch):
    """In order, with a tiny checkpoint and fewer steps; the last line of the second compares the images."""
    text = (Path(__file__).parents[2] / "docs/walkthrough.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = Path("runs/deco/checkpoints/step_000002000.ckpt")
    path.parent.mkdir(parents=True)
    model.save_model(random_model("deco-tiny", num_classes=2), path, names="published")
    found = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), found)
    assert len(found["images"]) == 4 and Path("out/pipeline_0.png").is_file()


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt=PROMPT), "class_labels: the model is conditioned on classes, expected class_labels, no prompt"),
        (dict(), "class_labels: the model is conditioned on classes"),
        (dict(class_labels=[1, 10]), r"class_labels: expected classes from 0 to 9, got \[1, 10\]"),
        (dict(class_labels=0.5), "class_labels: expected classes from 0 to 9, got 0.5"),
        (dict(class_labels="cat"), "class_labels: expected classes from 0 to 9, got 'cat'"),
        (dict(class_labels=[1, None]), r"class_labels: expected classes from 0 to 9, got \[1, None\]"),
        (dict(class_labels=True), "class_labels: expected classes from 0 to 9, got True"),
        (
            dict(class_labels=[1, 2], callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 3, 32, 48)}),
            r"callback_on_step_end: expected it to return latents of shape \[2, 3, 32, 48\], got \[1, 3, 32, 48\]",
        ),
        (dict(class_labels=1, height=30), "height and width: expected multiples of 16"),
        (dict(class_labels=1, output_type="latent"), "output_type: expected one of"),
        (dict(class_labels=1, num_images_per_prompt=0), "num_images_per_prompt: expected an int of at least 1, got 0"),
        (dict(class_labels=1, generator=[seeded(), seeded()]), "generator: expected one, or one for each of 1 images"),
        (dict(class_labels=1, num_inference_steps=0), "steps: expected at least 1, got 0"),
        (dict(class_labels=1, guidance_interval=(1.0, 0.0)), "guidance_interval: expected"),
    ],
)
def test_bad_calls_of_a_class_pipeline(options, message, class_pipeline):
    with pytest.raises(ValueError, match=message):
        class_pipeline(**{**SETTINGS, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(generator=3), "generator: expected a torch.Generator or a list of them, got 3"),
        (
            dict(callback_on_step_end=lambda *_: 5),
            "callback_on_step_end: expected it to return a dictionary or None",
        ),
    ],
)
def test_arguments_of_another_type(options, message, class_pipeline):
    with pytest.raises(TypeError, match=message):
        class_pipeline(class_labels=1, **SETTINGS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_labels=1), "prompt: the model is conditioned on text, expected prompt, no class_labels"),
        (dict(prompt=""), r"prompts\[0\]: expected text, got ''"),
        (dict(prompt="a very long prompt indeed"), r"prompts\[0\]: expected at most 7 tokens"),
        (dict(prompt=PROMPT, negative_prompt=["a", "b"]), "negative_prompt: expected 1 or 1 like prompt, got 2"),
    ],
)
def test_bad_calls_of_a_text_pipeline(options, message, text_pipeline):
    with pytest.raises(ValueError, match=message):
        text_pipeline(**SETTINGS, **options)


def test_prompts_without_an_encoder_and_other_components_that_do_not_fit(text_pipeline):
    net, encoder = text_pipeline.model, text_pipeline.text_encoder
    with pytest.raises(ValueError, match="prompt: the pipeline has no text encoder; give one, DeCoPipeline"):
        DeCoPipeline(net)(PROMPT, **SETTINGS)
    with pytest.raises(TypeError, match="text_encoder: expected a Qwen3TextEncoder for a DeCoTextToImage, got a"):
        DeCoPipeline(random_model("deco-tiny"), encoder)
    with pytest.raises(ValueError, match=r"text_encoder: expected max_length and width \(9, 20\)"):
        DeCoPipeline(random_model("deco-text-tiny", text_length=9), encoder)
    with pytest.raises(TypeError, match="model: expected one of DeCo, DeCoTextToImage, DiT, got Linear"):
        DeCoPipeline(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="solver: expected one of"):
        DeCoPipeline(net, solver="ddim")


def test_folders_that_do_not_fit(class_pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json: expected the file that DeCoPipeline.save"):
        DeCoPipeline.from_pretrained(tmp_path)
    for content, message in (
        ("{}", "expected a model of class DeCo, DeCoTextToImage, DiT, got None"),
        ("x", "expected the index of a DeCoPipeline, got JSONDecodeError"),
        ("[1]", "expected the index of a DeCoPipeline, got AttributeError"),
        ('{"model": 1}', "expected the index of a DeCoPipeline, got TypeError"),
        ('{"model": ["", ["DeCo"]]}', r"got \['DeCo'\]"),
        ('{"model": ["", "DeCo"], "text_encoder": 1}', "expected the index of a DeCoPipeline, got TypeError"),
        ('{"model": ["", "DeCo"], "solver": ["euler"]}', r"solver: expected a name, got \['euler'\]"),
        ('{"model": ["", "DeCo"], "shift": "2"}', "shift: expected a number, got '2'"),
    ):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            DeCoPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"model": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(ValueError, match="expected a model of class DeCo, DeCoTextToImage, DiT, got 'UNet2DModel'"):
        DeCoPipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="torch_dtype: expected a torch.dtype such as torch.bfloat16, got 'float16'"):
        DeCoPipeline.from_pretrained(tmp_path, torch_dtype="float16")
    with pytest.raises(TypeError, match="text_encoder: expected none for a DeCo, which reads classes"):
        model.save_model(class_pipeline.model, tmp_path / "a.ckpt")
        DeCoPipeline.from_checkpoint(tmp_path / "a.ckpt", text_encoder=tmp_path)
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        class_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="save_pretrained: expected options among .*, got variant; leave them out"):
        class_pipeline.save_pretrained(tmp_path, variant="fp16")


def test_a_missing_part_is_not_looked_for_on_the_hub(class_pipeline, text_pipeline, tmp_path, monkeypatch):
    """The relative path "half/model" would be an id of a repository."""
    from deco_kernels.model import hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for pipeline, part in ((class_pipeline, "model"), (text_pipeline, "text_encoder")):
        pipeline.save_pretrained(f"half_{part}")
        Path(f"half_{part}", part).rename(f"moved_{part}")
        with pytest.raises(FileNotFoundError, match=f"half_{part}/{part}: expected the folder that DeCoPipeline.save"):
            DeCoPipeline.from_pretrained(f"half_{part}")
