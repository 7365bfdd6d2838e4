"""The configuration: strict keys, types, overrides, and the published recipes."""

from pathlib import Path

import pytest
import torch

from deco_kernels import model
from deco_kernels.training import config, setup

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
        ("optimizer.lr=fast", "optimizer.lr"),
        ("steps=0", "steps: expected at least 1, got 0"),
        ("strategy=dp", "strategy: expected one of"),
        ("data.kind=zip", "data.kind: expected one of"),
        ("ema_decay=1", "ema_decay"),
        ("steps", "expected key=value, got 'steps'"),
        ("optimizer=3", "optimizer"),
        ("out=[", "not readable as YAML"),
    ],
)
def test_bad_overrides_are_refused(file, override, said):
    with pytest.raises(ValueError, match="(?s)" + said.replace("[", r"\[")):
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


# Parameters of the model, images over all steps, and rates, as published (DeCo, arXiv 2511.19365, section 4).
PUBLISHED = {
    "deco_l": (426_938_019, 256, 256, 1e-4, (0.9, 0.999), 200_000),
    "deco_xl": (682_282_851, 256, 256, 1e-4, (0.9, 0.999), 4_000_000),
    "deco_xl_512": (682_282_851, 512, 256, 1e-4, (0.9, 0.999), None),
    "deco_xxl_256": (1_133_759_395, 256, 1536, 2e-4, (0.9, 0.95), 200_000),
    "deco_xxl_512": (1_133_759_395, 512, 512, 1e-4, (0.9, 0.999), 80_000),
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
    """In turn as configured; classes spread evenly by default."""

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
