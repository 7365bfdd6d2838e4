"""The report of a check, as Markdown, from its journal and the result files of its benchmarks."""

import json
import os
from pathlib import Path

from benchmarks.gpu_check import probes
from benchmarks.gpu_check.running import Journal, say
from benchmarks.harness import results
from benchmarks.models import reuse
from benchmarks.report import tables
from benchmarks.report.markdown import section, table
from benchmarks.static.figures import BUDGETS
from benchmarks.static.machines import largest_bound, machine_of

OUTCOMES = ("passed", "failed", "error", "skipped")


def report(journal: Journal, folder: Path, out: Path) -> str:
    """The whole report; writes merged benchmarks and plots to `out`."""
    found = [_steps(journal), _tests(journal), _kernels(journal), _probes(journal), _recalibrated(journal)]
    found += [_sampling(journal), _benchmarks(folder, out)]
    return "\n\n".join(part.strip() for part in found if part) + "\n"


def failed_tests(journal: Journal) -> tuple[str, ...]:
    """IDs of the tests whose last outcome is not passed or skipped."""
    last = {entry["test"]: entry["outcome"] for entry in journal.having("test")}
    return tuple(test for test, outcome in last.items() if outcome in ("failed", "error"))


def _steps(journal: Journal) -> str:
    about = journal.having("machine")[0]["machine"]
    lines = [
        [entry["ended"], "passed" if entry["status"] == 0 else str(entry["status"]), f"{entry['seconds']:.0f}"]
        for entry in journal.having("ended")
    ]
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in about.items()]
    return section(f"# GPU check on {about['device']}", table(["step", "result", "s"], lines), facts)


def _tests(journal: Journal) -> str:
    tests = journal.having("test")
    if not tests:
        return ""
    counts = [f"{sum(test['outcome'] == outcome for test in tests)} {outcome}" for outcome in OUTCOMES]
    bad = [test for test in tests if test["outcome"] in ("failed", "error")]
    notes = [f"{test['test']}: {test['outcome']}: {' '.join(test['message'].split())[:500]}" for test in bad]
    return section("## Tests", ", ".join(counts), notes)


def _kernels(journal: Journal) -> str:
    """The Triton kernels that were compiled on this machine."""
    kernels = journal.having("cache")
    if not kernels:
        return ""
    missed = [kernel for kernel in kernels if kernel["cache"] != "hit"]
    counts = f"{len(kernels) - len(missed)} of {len(kernels)} found in the cache"
    notes = [f"{kernel['cache']} in the step {kernel['step']}: {kernel['kernel']}" for kernel in missed]
    return section("## Triton kernels", counts, notes)


def _probes(journal: Journal) -> str:
    """Cycles per scheduler of single instructions beside those of the static model."""
    rows = journal.having("probe")
    heads = ["instruction", "measured", "modeled", "measured / modeled"]
    lines = [
        [row["probe"], f"{row['cycles']:.2f}", f"{row['modeled']:.2f}", f"{row['cycles'] / row['modeled']:.2f}"]
        for row in rows
        if "cycles" in row
    ]
    notes = [f"{row['probe']}: {row['failed']}" for row in rows if "failed" in row]
    return section("## Cycles per scheduler", table(heads, lines), notes) if rows else ""


def _recalibrated(journal: Journal) -> str:
    """Modeled times of the timed kernels with the measured cycles of the probes in place of the model's."""
    measured = {row["probe"]: row["cycles"] / row["modeled"] for row in journal.having("probe") if "cycles" in row}
    rows = [row for row in journal.having("benchmark") if row["benchmark"] == "kernels" and row["modeled_ms"]]
    if not measured or not rows:
        return ""
    budgets = json.loads(BUDGETS.read_text())
    lines = []
    for row in rows:
        record, architecture = budgets[row["kernel"]][row["architecture"]], row["architecture"]
        machine = machine_of(architecture, row["multiprocessors"], row["clock"], row["bytes_per_second"])
        ratios = _ratios(measured, uses_wgmma=architecture == "sm_90")
        cycles = {pipe: value * ratios.get(pipe, 1.0) for pipe, value in record["cycles_per_16_px"].items()}
        bound = largest_bound(machine, cycles, record["bytes_per_px"])
        times = [row["modeled_ms"], bound.milliseconds, row["measured_ms"]]
        lines.append([row["kernel"], *(f"{ms:.3f}" if ms else "–" for ms in times), bound.name])
    heads = ["kernel", "modeled ms", "with measured cycles", "measured ms", "bound"]
    return section("## Kernels with the measured cycles per scheduler", table(heads, lines), [])


def _ratios(measured: dict[str, float], uses_wgmma: bool) -> dict[str, float]:
    """Pipe -> measured over modeled cycles; Triton's kernels use wgmma on sm_90, whose CUDA kernels are sm_90a's."""
    ratios = {pipe: measured[probe] for pipe, probe in probes.PIPES.items() if probe in measured}
    wgmma = [measured[probe] for probe in probes.WGMMA if probe in measured]
    return ratios | {"tensor": sum(wgmma) / len(wgmma)} if uses_wgmma and wgmma else ratios


def _sampling(journal: Journal) -> str:
    """One table per step that timed sampling."""
    steps: dict[str, list[dict]] = {}
    for row in journal.having("benchmark"):
        if row["benchmark"] == "reuse":
            steps.setdefault(row["step"], []).append(row)
    return section("## Sampling", "\n\n".join(map(reuse.table, steps.values())), []) if steps else ""


def _benchmarks(folder: Path, out: Path) -> str:
    """Merges the results of the benchmark steps, draws the plots, and returns the tables."""
    measured = [results.load(str(path)) for path in sorted(folder.glob("*.json"), key=os.path.getmtime)]
    if not measured:
        return "No benchmark wrote a result."
    merged = results.merge(measured)
    results.save(merged, str(out / "benchmarks.json"))
    try:
        from benchmarks.report import plots

        plots.draw(merged, str(out))
    except ImportError as error:
        say(f"no plots: {error}")
    return tables.markdown(merged)
