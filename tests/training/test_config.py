"""The configuration: strict keys, types, overrides, and the published recipes."""

import re
from pathlib import Path

import pytest
import torch

from deco_kernels import model
from deco_kernels.training import checks, config, setup
from tests.training.conftest import write_images

CONFIGS = Path(__file__).resolve().parents[2] / "python" / "configs"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: deco-tiny}\ndata: {path: images}\nout: run\noptimizer: {lr: 1e-3}\n")
    return path


def test_file_then_overrides_over_defaults(file):
    found = config.load(file, ["optimizer.betas=[0.9,0.95]", "model.options.depth=3", "strategy=fsdp2"])
    assert found.optimizer.lr == 1e-3 and found.optimizer.betas == [0.9, 0.95]
    assert found.model.options == {"depth": 3} and found.strategy == "fsdp2" and found.batch_size == 256
    again = file.with_name("again.yaml")
    again.write_text(config.to_yaml(found))
    assert config.load(again) == found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate; known are optimizer.lr"),
        ("optimzer.lr=1", "unknown key optimzer; did you mean optimizer"),
        ("batchsize=8", "unknown key batchsize; did you mean batch_size"),
        ("optimizer=1", "optimizer: expected keys below it, got 1; set those, such as optimizer.lr"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("steps=0", "steps: expected at least 1, got 0"),
        ("strategy=dp", "strategy: expected one of"),
        ("data.kind=zip", "data.kind: expected one of"),
        ("ema_decay=1", "ema_decay"),
        ("ema_decay=nan", "ema_decay: expected a number from 0 to below 1, got nan"),
        ("optimizer.lr=nan", "optimizer.lr: expected a finite number of at least 0, got nan"),
        ("optimizer.lr=-1e-3", "optimizer.lr: expected a finite number of at least 0, got -0.001"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay: expected a finite number of at least 0, got inf"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps: expected at least 0, got -1"),
        ("optimizer.clip_norm=nan", "optimizer.clip_norm: expected a finite number of at least 0, got nan"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas: expected two numbers from 0 to below 1, got [0.9, 1.0]"),
        ("optimizer.betas=[nan,0.9]", "optimizer.betas: expected two numbers from 0 to below 1, got [nan, 0.9]"),
        ("objective.label_dropout=nan", "objective.label_dropout: expected a number from 0 to 1, got nan"),
        ("objective.frequency_scale=inf", "objective.frequency_scale: expected a finite number of at least 0, got inf"),
        ("repa.weight=nan", "repa.weight: expected a finite number of at least 0, got nan"),
        ("data.max_aspect=nan", "data.max_aspect: expected a finite number of at least 1, got nan"),
        ("data.max_aspect=0.5", "data.max_aspect: expected a finite number of at least 1, got 0.5"),
        ("data.workers=-1", "data.workers: expected at least 0, got -1"),
        ("data.prefetch=0", "data.prefetch: expected at least 1, got 0"),
        ("devices=0", "devices: expected at least 1, got 0"),
        ("seed=-1", "seed: expected at least 0, got -1"),
        ("seed=9223372036854775808", "seed: expected less than 2**63, got 9223372036854775808"),
        ("sample.every=-1", "sample.every: expected at least 0, got -1"),
        ("steps", "expected key=value, got 'steps'"),
        ("optimizer=3", "optimizer"),
        ("model.options=[1]", "command line: model.options: Cannot merge"),
        ("out=''", "out: expected a path, got ''"),
        ("out=[", "override: the value of 'out=[' is not valid YAML; quote it"),
        ("data.path=*.csv", "override: the value of 'data.path=*.csv' is not valid YAML; quote it"),
    ],
)
def test_bad_overrides_are_refused(file, override, said):
    with pytest.raises(ValueError, match="(?s)" + re.escape(said)):
        config.load(file, [override])


def test_bad_files_are_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        config.load(tmp_path / "missing.yaml")
    file.write_text("model: {name: deco-tiny}\nout: run\n")
    with pytest.raises(ValueError, match="no value for data.path"):
        config.load(file)
    file.write_text("- a list\n")
    with pytest.raises(ValueError, match="mapping"):
        config.load(file)


# Parameters of the model, size, images per step, rate, betas and steps, as published (DeCo, arXiv 2511.19365,
# section 4); betas and steps of deco_xxl_512 as in the published configuration.
PUBLISHED = {
    "deco_l": (426_938_019, 256, 256, 1e-4, (0.9, 0.999), 200_000),
    "deco_xl": (682_282_851, 256, 256, 1e-4, (0.9, 0.999), 4_000_000),
    "deco_xl_512": (682_282_851, 512, 256, 1e-4, (0.9, 0.999), None),
    "deco_xxl_256": (1_133_759_395, 256, 1536, 2e-4, (0.9, 0.95), 200_000),
    "deco_xxl_512": (1_133_759_395, 512, 512, 1e-4, (0.9, 0.95), 100_000),
    "deco_xxl_tune": (1_133_759_395, 512, 512, 1e-5, (0.9, 0.999), 40_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    parameters, size, batch, lr, betas, steps = PUBLISHED[name]
    found = config.load(CONFIGS / f"{name}.yaml", ["data.path=images", "out=run"])
    with torch.device("meta"):
        network = model.build(found.model.name, **found.model.options)
    assert sum(each.numel() for each in network.parameters()) == parameters
    assert (found.image_size, found.batch_size, found.optimizer.lr) == (size, batch, lr)
    assert tuple(found.optimizer.betas) == betas and (steps is None or found.steps == steps)
    assert found.precision == "bf16-mixed" and found.ema_decay == 0.9999 and found.repa.weight == 0.5
    assert found.repa.block == (6 if "xxl" in name else 8)
    assert found.objective.label_dropout == (0.2 if "xl" in name and "xxl" not in name else 0.1)


def test_every_recipe_loads():
    for path in CONFIGS.glob("*.yaml"):
        config.load(path, ["data.path=images", "out=run"])


def test_conditions_of_the_samples():
    """Conditions cycle as configured; by default, classes are spread evenly."""

    def shown(num_classes=None, **sample):
        return setup.shown_conditions(config.SampleConfig(**sample), num_classes)

    assert shown(1000, count=4) == [0, 250, 500, 750] and shown(2, count=3) == [0, 0, 1]
    assert shown(10, count=5, labels=[9, 0]) == [9, 0, 9, 0, 9]
    assert shown(count=3, prompts=["sea", "sky"]) == ["sea", "sky", "sea"]
    assert shown(2, every=0, labels=[9]) == []


@pytest.mark.parametrize(
    ("num_classes", "sample", "said"),
    [
        (10, dict(labels=[0, 10]), r"sample.labels: expected classes of the model, from 0 to 9, got \[10\]"),
        (10, dict(labels=[-1, 3]), r"sample.labels: expected classes of the model, from 0 to 9, got \[-1\]"),
        (10, dict(labels=[]), "sample.labels: expected at least one, got none"),
        (None, dict(prompts=[]), "sample.prompts: expected at least one, got none"),
        (10, dict(count=0), "sample.count: expected at least 1, got 0"),
    ],
)
def test_samples_that_cannot_be_drawn(num_classes, sample, said):
    with pytest.raises(ValueError, match=said):
        setup.shown_conditions(config.SampleConfig(**sample), num_classes)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.name=deco-huge", "name: expected one of"),
        ("model.options.depth=a", "depth: expected an int, got 'a' (str)"),
        ("image_size=40", "image_size: expected a multiple of the patch size 16, got 40"),
        ("accumulate=7", "batch_size: expected a multiple of processes x accumulate = 1 x 7, got 256"),
        ("devices=3", "batch_size: expected a multiple of processes x accumulate = 3 x 1, got 256"),
        ("repa.block=3", "repa.block: expected a block from 1 to 2, got 3"),
        ("objective.quality=0", "quality: expected 1 to 100, got 0"),
        ("objective.distribution=normal", "distribution: expected one of ['lognormal', 'uniform'], got 'normal'"),
        ("objective.shift=nan", "shift: expected a positive finite number, got nan"),
        ("sample.labels=[10]", "sample.labels: expected classes of the model, from 0 to 9, got [10]"),
        ("sample.solver=rk4", "sample.solver: expected one of"),
        ("sample.steps=0", "sample.steps: expected at least 1, got 0"),
        ("sample.guidance=nan", "sample.guidance: expected a finite number, got nan"),
        ("sample.guidance_interval=[0.5]", "sample.guidance_interval: expected (lo, hi)"),
        ("sample.shift=0", "sample.shift: expected a positive finite number, got 0"),
        ("model.options.num_classes=1", "has labels from 0 to 1, the model has 1 classes; see model.options.num_class"),
        ("model.name=deco-text-tiny", "data.kind: folders hold classes, not captions"),
    ],
)
def test_what_no_run_can_be_set_up_with(file, override, said):
    """Reported before processes start; the same configuration without the override is valid."""
    for name in ("ant", "bee"):
        write_images(file.parent / "images" / name, 1)
    given = [f"data.path={file.parent / 'images'}", "repa.block=1", "accelerator=cpu"]
    checks.check(config.load(file, given))
    with pytest.raises((ValueError, TypeError, OSError), match="(?s)" + re.escape(said)):
        checks.check(config.load(file, [*given, override]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text.encoder=./nowhere", "text.encoder: expected a folder with a model of transformers, or an id of"),
        ("data.caption_column=title", "data.caption_column: no column 'title'; there are ['image', 'caption']"),
        ("model.name=deco-tiny", "data.label_column: no column 'label'; there are ['image', 'caption']"),
    ],
)
def test_what_no_text_model_can_be_set_up_with(file, override, said):
    table = file.with_name("table.csv")
    table.write_text("image,caption\na.jpg,a cat\n")
    given = ["model.name=deco-text-tiny", "data.kind=table", f"data.path={table}", "repa.block=1", "accelerator=cpu"]
    checks.check(config.load(file, given))
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        checks.check(config.load(file, [*given, override]))
