"""`python -m benchmarks [PART ...]`: measures, prints Markdown, writes JSON. See docs/benchmarks.md."""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.names import DEVICE_BACKENDS, DTYPES, EXTRAS, FORWARD, ON_REQUEST, OPS, TRAINING
from benchmarks.ops.sizes import PRESETS, STANDARD, size_of
from deco_kernels.command_line import new_file, print_any_text, thread_count
from deco_kernels.machine import keep_heap
from deco_kernels.native import ISA_VARIABLE

# Subcommands: modules with a `main(arguments)` function.
COMMANDS = {
    "codec": "benchmarks.models.codec",
    "fused_losses": "benchmarks.models.fused_losses",
    "host_time": "benchmarks.models.host_time",
    "report": "benchmarks.report.__main__",
    "reuse": "benchmarks.models.reuse",
    "static": "benchmarks.static.__main__",
    "swap": "benchmarks.models.swap",
    "training": "benchmarks.models.training",
    "trunk": "benchmarks.models.trunk",
}
PASSES = {"forward": (FORWARD,), "backward": (TRAINING,), "both": (FORWARD, TRAINING)}
AVX2 = {
    ISA_VARIABLE: "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    # Inductor's own cache would return loops for the vectors of another instruction set.
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_avx2_{os.getuid()}"),
}
"""Environment that holds the cpu backend, PyTorch, oneDNN and MKL to AVX2."""
_BY_HAND = "B=4,H=256,W=256,D=32,N=3,p=16,Z=1152"


def main(arguments: list[str]) -> int:
    print_any_text()
    try:
        if arguments and arguments[0] in COMMANDS:
            return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        return _run(arguments)
    except (ValueError, MemoryError, OSError) as error:
        said = str(error)
    except ModuleNotFoundError as error:
        said = f"{error}; install the package"
    print(f"benchmarks: {said}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    if options.device == "cpu" and not options.default_heap:
        keep_heap("-m", "benchmarks", *arguments, **(AVX2 if options.avx2 else {}))

    from benchmarks import run

    return run.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the ops against eager PyTorch and torch.compile; each is first checked against float64.",
        epilog=f"Other commands, each with a --help of its own, as the first word: {', '.join(COMMANDS)}. `python -m "
        "benchmarks report FILE.json` prints an earlier result as Markdown.",
    )
    parts, more = ", ".join(OPS + EXTRAS), ", ".join(ON_REQUEST)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{parts} (default: those of the device); on request only: {more}"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype", action="append", metavar="DTYPE", help=f"{', '.join(DTYPES)}; repeatable (default: the first two)"
    )
    parser.add_argument(
        "--pass",
        dest="pass_",
        default="both",
        metavar="PASS",
        help="forward, backward (forward and backward of a training step), or both (default)",
    )
    parser.add_argument(
        "--size",
        action="append",
        metavar="SIZE",
        help=f"{', '.join(PRESETS)}, or explicit sizes such as {_BY_HAND}; repeatable (default: {STANDARD})",
    )
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="repeatable (default: every backend of the device)"
    )
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument(
        "--default-heap",
        action="store_true",
        help="keep the C library's default heap settings; eager PyTorch then spends much of its time in page faults",
    )
    parser.add_argument("--avx2", action="store_true", help="hold the cpu backend, PyTorch, oneDNN and MKL to AVX2")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; no torch.compile, no reference backend")
    parser.add_argument(
        "--full", action="store_true", help="all parts of the device, and on a GPU torch.compile max-autotune"
    )
    parser.add_argument(
        "--stop-after",
        type=float,
        metavar="SECONDS",
        help="skip parts that have not started by then, except the first",
    )
    parser.add_argument(
        "--compare", metavar="OLD.json", help="list rows that moved beyond the spread since that result"
    )
    parser.add_argument("--stream", action="store_true", help="print every row as a line of JSON once it is measured")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="CONTENDER",
        help="time nothing else: run this contender (default: the fused op) between the marks of profilers",
    )
    parser.add_argument(
        "--trace", metavar="FILE.json", help="as --profile, and write a Chrome trace and a table of times"
    )
    parser.add_argument("--csv", metavar="FILE.csv", help="write the rows to this file at the end")
    parser.add_argument("--output", metavar="FILE.json", help="write the result to this file, again after each part")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Validates the options before anything expensive is loaded, and fills in the defaults."""
    for part in options.parts:
        if part not in OPS + EXTRAS + ON_REQUEST:
            raise ValueError(
                f"unknown part {part!r}; use {', '.join(OPS + EXTRAS + ON_REQUEST)}, or as the first word a command: "
                f"{', '.join(COMMANDS)}"
            )
    if options.device not in DEVICE_BACKENDS:
        raise ValueError(f"unknown device {options.device!r}; use {' or '.join(DEVICE_BACKENDS)}")
    options.dtype = list(dict.fromkeys(options.dtype or DTYPES[:2]))
    for dtype in options.dtype:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    if options.pass_ not in PASSES:
        raise ValueError(f"unknown pass {options.pass_!r}; use {', '.join(PASSES)}")
    options.pass_ = PASSES[options.pass_]
    if options.stop_after is not None and not options.stop_after > 0:
        raise ValueError(f"--stop-after must be positive, got {options.stop_after}")
    if options.quick and options.full:
        raise ValueError("--quick and --full exclude each other; leave one out")
    if options.avx2 and options.device != "cpu":
        raise ValueError("--avx2 is for the device cpu; leave it out or use --device cpu")
    if options.avx2 and options.default_heap:
        raise ValueError("--avx2 and --default-heap exclude each other; leave one out")
    elsewhere = {"cpu": ("kernels",), "cuda": ("avx2",)}[options.device]
    for part in elsewhere:
        if part in options.parts:
            device = "cuda" if options.device == "cpu" else "cpu"
            raise ValueError(f"part {part} belongs to the device {device}; leave it out or use --device {device}")
    if options.profile is not None or options.trace is not None:
        _check_profile(options)
    default = OPS + EXTRAS + (ON_REQUEST if options.full else ())
    options.parts = options.parts or [part for part in default if part not in elsewhere]
    options.size = options.size or [STANDARD]
    for size in options.size:
        for op in OPS:
            if op in options.parts:
                size_of(size, op)
    for name, kind in {"threads": thread_count, "output": new_file, "csv": new_file, "trace": new_file}.items():
        try:
            if (given := getattr(options, name)) is not None:
                setattr(options, name, kind(given))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--{name}: {error}") from None


def _check_profile(options: argparse.Namespace) -> None:
    """Only ops run between the marks of profilers, and nothing is measured beside them."""
    if other := [part for part in options.parts if part not in OPS]:
        raise ValueError(f"--profile and --trace run one op, not the part {other[0]}; leave it out")
    for name in ("backend", "output", "csv", "compare", "stream", "stop_after", "quick", "full", "no_compile"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --profile or --trace; leave it out")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
