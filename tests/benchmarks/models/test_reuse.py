"""`python -m benchmarks reuse` times both contenders and refuses what the sampler refuses."""

import json

import pytest

from benchmarks.models import reuse
from deco_kernels import model

SMALL = [
    "--preset",
    "deco-tiny",
    "--size",
    "32",
    "--steps",
    "4",
    "--trunk-steps",
    "2",
    "--rounds",
    "2",
    "--threads",
    "1",
]


@pytest.fixture(autouse=True)
def heap(monkeypatch, one_thread):
    """keep_heap would start the test process anew."""
    monkeypatch.setattr(reuse, "keep_heap", lambda *_: None)


def test_a_result_has_both_contenders(tmp_path, capsys):
    assert reuse.main([*SMALL, "--stream", "--output", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["trunk_steps"] for row in result["rows"]] == [4, 2]
    assert all(row["least_ms"] > 0 and row["rounds"] == 2 for row in result["rows"])
    printed = capsys.readouterr().out
    streamed = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert streamed == [{"benchmark": "reuse"} | row for row in result["rows"]]
    assert reuse.table(result["rows"]) in printed


def test_the_trunk_of_some_contenders_is_compiled(tmp_path, capsys, monkeypatch):
    """Not that of the others, which have the same weights."""
    compiled, sampled = set(), []
    monkeypatch.setattr(model.DeCo, "compile_trunk", lambda network: compiled.add(id(network)))
    forward = model.DeCo.forward
    monkeypatch.setattr(model.DeCo, "forward", lambda net, *args: sampled.append(id(net)) or forward(net, *args))
    path = tmp_path / "result.json"
    assert reuse.main([*SMALL, "--dtype", "float32", "--compile-trunk", "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["trunk_steps"], row["compiled"]) for row in rows] == [(4, False), (2, False), (4, True), (2, True)]
    assert len(compiled) == 2 and set(sampled) - compiled and compiled & set(sampled)
    assert capsys.readouterr().out.count("fused, compiled trunk") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trunk-steps", "5"], "trunk_steps: expected from 1 to 4, the number of steps, got 5"),
        (["--trunk-steps", "0"], "trunk_steps: expected from 1 to 4"),
        (["--size", "40"], "expected height and width to be positive multiples"),
        (["--preset", "none"], "none"),
    ],
)
def test_bad_input_takes_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        reuse.main([*SMALL, *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
