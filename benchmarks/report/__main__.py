"""`python -m benchmarks report FILE.json`: Markdown and plots from result files, without measuring."""

import argparse
import os
import sys

from benchmarks.harness import results
from benchmarks.report import comparison, tables


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        result = results.merge([results.load(path) for path in options.files])
        text = tables.markdown(result)
        if options.compare:
            text += "\n" + comparison.markdown(results.load(options.compare), result)
        if options.merged:
            results.save(result, options.merged)
        if options.output:
            with open(options.output, "w", encoding="utf-8") as file:
                file.write(text)
        elif not options.plots:
            sys.stdout.write(text)
        if options.plots:
            _draw(result, options.plots)
    except (OSError, ValueError) as error:
        print(f"benchmarks report: {error}", file=sys.stderr)
        return 2
    return 0


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
    parser.add_argument("--output", metavar="FILE.md", help="write the Markdown to this file instead of printing it")
    parser.add_argument("--plots", metavar="FOLDER", help="write plots there instead of printing; needs matplotlib")
    parser.add_argument("--compare", metavar="OLD.json", help="list rows that moved beyond the spread since then")
    parser.add_argument("--merged", metavar="FILE.json", help="write the merged results to this file")
    return parser


def _draw(result: dict, folder: str) -> None:
    try:
        from benchmarks.report import plots
    except ImportError as error:
        raise ValueError(f"plots need matplotlib ({error}); install it, or omit --plots") from error
    os.makedirs(folder, exist_ok=True)
    for path in plots.draw(result, folder):
        print(path)
