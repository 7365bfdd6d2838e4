"""`python -m benchmarks report FILE.json`: Markdown and plots from result files, without measuring."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.harness import results
from benchmarks.report import comparison, tables
from deco_kernels.command_line import new_file

_MACHINE = ("device", "processor", "gpu", "threads", "held_to")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    found = [tables.load(path) for path in options.files]
    _require_one_machine(found, options.files)
    result = results.merge(found)
    text = tables.markdown(result)
    if options.compare:
        text += "\n" + comparison.markdown(tables.load(options.compare), result)
    if options.merged:
        results.save(result, options.merged)
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")
    elif not options.plots:
        sys.stdout.write(text)
    if options.plots:
        _draw(result, options.plots)
    return 0


def _require_one_machine(found: list[dict], paths: list[str]) -> None:
    """Raises ValueError for results of several machines, and for rows in two of them: a ratio is that of one run."""
    seen: set[tuple] = set()
    for result, path in zip(found, paths, strict=True):
        for field in _MACHINE:
            wanted, given = (each["header"].get(field) for each in (found[0], result))
            if given != wanted:
                raise ValueError(f"{path}: expected the {field} of {paths[0]}, {wanted}, got {given}; report it alone")
        keys = {comparison.key_of(row): row for row in result["rows"]}
        if shared := [row for key, row in keys.items() if key in seen]:
            what = ", ".join(str(shared[0][name]) for name in ("op", "dtype", "pass", "contender"))
            raise ValueError(f"{path}: holds rows that an earlier file holds, such as {what}; leave one of them out")
        seen |= keys.keys()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description="Markdown and plots from result files; measures nothing."
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE.json",
        help="result of `python -m benchmarks --output`; several results of one machine are merged",
    )
    parser.add_argument(
        "--output", type=new_file, metavar="FILE.md", help="write the Markdown to this file instead of printing it"
    )
    parser.add_argument("--plots", metavar="FOLDER", help="write plots there instead of printing; needs matplotlib")
    parser.add_argument("--compare", metavar="OLD.json", help="list rows that moved beyond the spread since then")
    parser.add_argument("--merged", type=new_file, metavar="FILE.json", help="write the merged results to this file")
    return parser


def _draw(result: dict, folder: str) -> None:
    try:
        from benchmarks.report import plots
    except ImportError as error:
        raise ValueError(f"plots need matplotlib ({error}); install it, or omit --plots") from error
    os.makedirs(folder, exist_ok=True)
    for path in plots.draw(result, folder):
        print(path)
