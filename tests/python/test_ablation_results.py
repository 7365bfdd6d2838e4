"""The figures of docs/ablations.md, and of the reused trunk in docs/sampling.md, match the committed studies."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from studies.catalog import STUDIES
from studies.reuse import Settings, contenders
from studies.reuse_report import COLUMNS, summary

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results" / "ablations"
PAGE = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
SQUARES = [f"{metric}, squares" for metric in ("pixel", "jpeg85", "low", "high")]
ERRORS = {  # study → columns of held-out errors on the page
    "interaction": SQUARES,
    "capacity": ["pixel, squares", "high, squares"],
    "frequency": SQUARES,
    "aspect": [f"{metric}, {images}" for images in ("squares", "rectangles") for metric in ("pixel", "high")],
}
COSTS = {"capacity": ["decoder, ms", "in published eager, ms", "kFLOP per pixel"]}


def runs(study: str) -> list[dict[str, str]]:
    with open(RESULTS / f"{study}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", STUDIES)
def test_committed_study_is_whole(name):
    study = STUDIES[name]
    expected = {(variant.name, str(seed)) for variant in study.variants for seed in range(3)}
    assert {(run["variant"], run["seed"]) for run in runs(name)} == expected
    assert {run["steps"] for run in runs(name)} == {str(study.steps)}


@pytest.mark.parametrize("name", STUDIES)
def test_figures_are_those_of_the_study(name):
    for variant in STUDIES[name].variants:
        own = [run for run in runs(name) if run["variant"] == variant.name]
        cells = [f"{float(own[0][column]):.3g}" for column in COSTS.get(name, [])]
        for column in ERRORS[name]:
            errors = [float(run[column]) for run in own]
            cells.append(f"{statistics.fmean(errors):.4f} ({min(errors):.4f} to {max(errors):.4f})")
        line = f"| {variant.name} | {' | '.join(cells)} |"
        assert line in PAGE.splitlines(), line


@pytest.mark.parametrize("rule", ["loss", "likelihood"])
def test_range_of_learned_luminance_weights(rule):
    weights = json.loads((RESULTS / "weights.json").read_text(encoding="utf-8"))[f"learned by {rule}"]
    luminance = [weight for row in weights[0] for weight in row]
    assert f"between {min(luminance):.2f} and {max(luminance):.2f}" in PAGE.replace("\n", " ")


def test_times_are_those_measured():
    times = json.loads((RESULTS / "times.json").read_text(encoding="utf-8"))["seconds"]
    assert set(times) == set(STUDIES)
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    assert all(rows[study].endswith(f"| {seconds} s |") for study, seconds in times.items())


def test_table_of_the_reused_trunk():
    lines = runs("reuse")
    assert [(f"{line['kind']} {line['count']}", line["seed"]) for line in lines] == [
        (contender.name, str(seed)) for seed in range(3) for contender in contenders(50)
    ]
    results = [line | {name: float(line[name]) if line[name] else None for name in COLUMNS} for line in lines]
    seconds = {f"{line['kind']} {line['count']}": float(line["seconds"]) for line in lines}
    table = [line for line in summary(Settings(), results, seconds).splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    assert len(table) == 24 and "\n".join(table) in page
