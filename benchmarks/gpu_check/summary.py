"""The report of a check, as Markdown, from its journal and the result files of its benchmarks."""

import os
from pathlib import Path

from benchmarks.gpu_check.running import Journal, say
from benchmarks.harness import results
from benchmarks.report import tables
from benchmarks.report.markdown import section, table

OUTCOMES = ("passed", "failed", "error", "skipped")


def report(journal: Journal, folder: Path, out: Path) -> str:
    """The whole report; writes merged benchmarks and plots to `out`."""
    found = [_steps(journal), _tests(journal), _kernels(journal), _probes(journal), _benchmarks(folder, out)]
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
    probes = journal.having("probe")
    heads = ["instruction", "measured", "modeled", "measured / modeled"]
    lines = [
        [row["probe"], f"{row['cycles']:.2f}", f"{row['modeled']:.2f}", f"{row['cycles'] / row['modeled']:.2f}"]
        for row in probes
        if "cycles" in row
    ]
    notes = [f"{row['probe']}: {row['failed']}" for row in probes if "failed" in row]
    return section("## Cycles per scheduler", table(heads, lines), notes) if probes else ""


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
