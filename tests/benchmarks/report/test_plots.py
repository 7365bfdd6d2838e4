"""Plots from a stored result. The figures of result.json are made up."""

import pathlib

import pytest

from tests.installed import installed

installed("matplotlib")

import matplotlib.image  # noqa: E402

from benchmarks.harness import results  # noqa: E402
from benchmarks.report import __main__ as report_program  # noqa: E402
from benchmarks.report import plots  # noqa: E402

STORED = pathlib.Path(__file__).parents[1] / "result.json"


def test_every_part_is_drawn(tmp_path, capsys):
    assert report_program.main([str(STORED), "--plots", str(tmp_path / "new")]) == 0
    paths = [pathlib.Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ["speedups", "roofline", "scaling", "memory", "end_to_end"]
    assert [path.stem for path in paths] == names
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.02


def test_parts_without_rows_are_not_drawn(tmp_path):
    result = results.load(STORED) | {name: [] for name in results.LISTS}
    assert plots.draw(result, str(tmp_path)) == [] and list(tmp_path.iterdir()) == []


def test_the_roofline_stands_on_the_measured_ceilings():
    result = results.load(STORED)
    axes = plots.roofline(result).axes[0]
    roof = axes.lines[0].get_xydata()
    intensity = result["ceilings"]["flops"]["float32"] / result["ceilings"]["bytes_per_s"]
    assert roof[1] == pytest.approx([intensity, 200])
    rates = {round(line.get_ydata()[0]) for line in axes.lines[1:]}
    assert 160 in rates  # 2e9 FLOPs in 12.5 ms


def test_time_per_pixel_is_drawn_on_log_axes():
    axes = plots.scaling(results.load(STORED)).axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["cpu"][-1] == pytest.approx([2048**2, 739.2e6 / 2048**2])
