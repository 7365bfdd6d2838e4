"""The figures of docs/ablations.md are those of the committed studies."""

import csv
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ablations"
PAGE = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
NAMES = {"adaln": "AdaLN", "add": "addition", "JPEG 100": "JPEG 100 (all weights 1)"}  # on the page, where they differ


@pytest.mark.parametrize("study", ["interaction", "frequency"])
def test_held_out_errors_are_those_of_the_study(study):
    with open(RESULTS / f"{study}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2 and {row["seed"] for row in rows} == {"0"}
    for row in rows:
        errors = [f"{float(row[f'{kind}, squares']):.4f}" for kind in ("pixel", "jpeg85", "low", "high")]
        line = f"| {NAMES.get(row['variant'], row['variant'])} | {' | '.join(errors)} |"
        assert line in PAGE.splitlines(), line


@pytest.mark.parametrize("rule", ["loss", "likelihood"])
def test_range_of_learned_luminance_weights(rule):
    luminance = json.loads((RESULTS / f"learned_by_{rule}.json").read_text(encoding="utf-8"))["frequency_weight"][0]
    weights = [weight for row in luminance for weight in row]
    assert f"between {min(weights):.2f} and {max(weights):.2f}" in PAGE.replace("\n", " ")
