"""Markdown from a result file: `python -m benchmarks report FILE.json`."""

import argparse
import json
import sys

from benchmarks.names import BACKWARD_ALONE, BEST_EAGER, COMPILED, PUBLISHED, TRAINING
from benchmarks.targets import targets_in

FORMAT = 1

_TITLES = {
    PUBLISHED: "published eager",
    BEST_EAGER: "best eager",
    COMPILED: "published, torch.compile",
    BACKWARD_ALONE: "backward kernel alone",
    TRAINING: "forward and backward",
}


def markdown(result: dict) -> str:
    """The whole report."""
    parts = [_header(result), *(_timings(rows, result["ceilings"]) for rows in groups(result["rows"]))]
    parts += [_memory(result["memory"]), _overhead(result["overhead"]), _import_time(result["import_time"])]
    if result["header"]["device"] == "cpu":
        parts.append(targets_table(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def groups(rows: list[dict]) -> list[list[dict]]:
    """Rows that were timed in turns with each other, in the order of the file."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        together = TRAINING if row["pass"] == BACKWARD_ALONE else row["pass"]
        key = (row["op"], tuple(row["size"].items()), row["dtype"], together, row["forced_instruction_set"])
        found.setdefault(key, []).append(row)
    return list(found.values())


def _table(heads: list[str], lines: list[list[str]]) -> str:
    """The first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def _section(head: str, table: str, notes: list[str]) -> str:
    return "\n\n".join(part for part in (head, table, "\n".join(notes)) if part)


def _header(result: dict) -> str:
    header, ceilings = result["header"], result["ceilings"]
    lines = [f"# Benchmarks on {header.get('gpu') or header['processor']}", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in header.items() if value is not None]
    lines.append(f"- ceilings, measured in this run: copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s")
    for name, rates in (("matmul", ceilings["matmul_flops_per_s"]), ("multiply-add", ceilings["fma_flops_per_s"])):
        if rates:
            rates_text = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in sorted(rates.items()))
            lines.append(f"- ceilings, measured in this run: {name} {rates_text} GFLOP/s")
    return "\n".join(lines)


def _timings(rows: list[dict], ceilings: dict) -> str:
    first = rows[0]
    size = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in first["size"].items())
    pass_ = TRAINING if first["pass"] == BACKWARD_ALONE else first["pass"]
    title = f"## {first['op']}, {first['dtype']}, {_TITLES.get(pass_, pass_)}"
    if first["forced_instruction_set"]:
        title += f", ours with {first['forced_instruction_set']}"
    medians = {row["contender"]: row["ms"] for row in rows if row["status"] == "ok" and row["pass"] == pass_}
    best = medians.get(BEST_EAGER, medians.get(PUBLISHED))
    lines, notes = [], []
    for row in rows:
        name = _TITLES.get(row["contender"], row["contender"])
        if row["pass"] == BACKWARD_ALONE:
            name += f", {_TITLES[BACKWARD_ALONE]}"
        if row["status"] != "ok":
            notes.append(f"{name}: {row['status']}: {row['reason']}")
            continue
        seconds = row["ms"] / 1e3
        share, limit = share_of_ceiling(row, ceilings)
        lines.append(
            [
                name + (" (unstable)" if row["unstable"] else ""),
                f"{row['ms']:.3g}",
                f"{row['ms_p20']:.3g} to {row['ms_p80']:.3g}",
                _ratio(medians.get(PUBLISHED), row["ms"]),
                _ratio(best, row["ms"]),
                f"{row['bytes'] / seconds / 1e9:.1f}",
                f"{row['flops'] / seconds / 1e9:.0f}",
                f"{share:.0f} % of {limit}",
            ]
        )
    heads = ["contender", "ms", "20 to 80 %", "× published", "× best eager", "GB/s", "GFLOP/s", "of ceiling"]
    table = _table(heads, lines) if lines else ""
    return _section(f"{title}\n\n{size}", table, [f"- {note}" for note in notes])


def share_of_ceiling(row: dict, ceilings: dict) -> tuple[float, str]:
    """Percent of the speed that the measured ceilings allow, and which of them binds: "memory" or "compute"."""
    memory = row["bytes"] / ceilings["bytes_per_s"]
    compute = row["flops"] / ceilings["flops"][row["arithmetic"]]
    return 100 * max(memory, compute) / (row["ms"] / 1e3), "memory" if memory > compute else "compute"


def _ratio(reference: float | None, value: float) -> str:
    return "–" if reference is None else f"{reference / value:.2f}"


def _memory(rows: list[dict]) -> str:
    if not rows:
        return ""
    published = {
        row["dtype"]: row["growth_bytes"] for row in rows if row["contender"] == PUBLISHED and "growth_bytes" in row
    }
    lines, notes = [], []
    for row in rows:
        name = f"{_TITLES.get(row['contender'], row['contender'])}, {row['dtype']}"
        if row["status"] != "ok":
            notes.append(f"- {name}: {row['status']}: {row['reason']}")
            continue
        grown = row["growth_bytes"]
        lines.append([name, f"{grown / 1e6:.1f}", _ratio(published.get(row["dtype"]), grown)])
    head = f"## Peak memory growth of {rows[0]['op']}, forward and backward, {rows[0]['pixels']:,} pixels"
    return _section(head, _table(["contender", "MB, outputs included", "× published"], lines), notes)


def _overhead(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines, notes = [], []
    for row in rows:
        name = f"{_TITLES.get(row['contender'], row['contender'])}, {_TITLES.get(row['pass'], row['pass'])}"
        if row["status"] == "ok":
            lines.append([name, f"{row['us']:.1f}"])
        else:
            notes.append(f"- {name}: {row['status']}: {row['reason']}")
    head = f"## Host time per call of {rows[0]['op']} on one pixel"
    return _section(head, _table(["contender", "µs"], lines), notes)


def _import_time(found: dict | None) -> str:
    if not found:
        return ""
    lines = [["deco_kernels", f"{found['package_s']:.4f}"], ["deco_kernels.ops", f"{found['package_and_ops_s']:.4f}"]]
    return "## Import, beyond importing PyTorch\n\n" + _table(["module", "s"], lines)


def targets_table(result: dict) -> str:
    lines = []
    for target in targets_in(result):
        sign = "≥" if target.at_least else "≤"
        reached = "not measured" if target.reached is None else f"{target.reached:.3g} {target.unit}"
        verdict = "–" if target.reached is None else "yes" if target.met else "no"
        best = "–" if target.against_best is None else f"{target.against_best:.3g} x"
        lines.append([target.text, f"{sign} {target.value:g} {target.unit}", reached, verdict, best])
    return "## Targets\n\n" + _table(["what", "target", "reached", "met", "against best eager"], lines)


def load(path: str) -> dict:
    """A result file.

    Raises:
        OSError: it cannot be read. ValueError: it is not a result of this format.
    """
    with open(path, encoding="utf-8") as file:
        try:
            result = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result of `python -m benchmarks --output` (format {FORMAT})")
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description="Prints a result as Markdown.")
    parser.add_argument("file", help="what `python -m benchmarks --output FILE.json` wrote")
    parser.add_argument("--output", metavar="FILE.md", help="write there instead of printing")
    options = parser.parse_args(arguments)
    try:
        text = markdown(load(options.file))
        if options.output:
            with open(options.output, "w", encoding="utf-8") as file:
                file.write(text)
        else:
            sys.stdout.write(text)
    except (OSError, ValueError) as error:
        print(f"benchmarks report: {error}", file=sys.stderr)
        return 2
    return 0
