"""Converts checkpoints between published .ckpt files, safetensors, and the format of deco_kernels.

    python python/convert.py published.ckpt                                # describes the file
    python python/convert.py published.ckpt model.safetensors --weights ema
    python python/convert.py model.safetensors again.ckpt --names published

The extension of OUT selects the container. Files are memory-mapped and read without executing code from them. Every
tensor must fit the model; values are copied bit for bit. Exit status: 0; 2 with a line that begins with "error:", and
OUT is not written.
"""

import argparse
import sys

from command_line.failures import exit_status
from deco_kernels.model.checkpoint_file import (
    NAMES,
    OURS,
    PUBLISHED,
    Checkpoint,
    container_of,
    read_checkpoint,
    save_model,
    write_tensors,
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.out:
        container_of(options.out)
    checkpoint = read_checkpoint(options.source, allow_globals=options.allow_global)
    print(checkpoint.summary())
    if options.out:
        convert(checkpoint, options)
        print(read_checkpoint(options.out).summary())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python/convert.py", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="IN", help="torch or safetensors file, published or from this package")
    parser.add_argument("out", metavar="OUT", nargs="?", help="file to write; if omitted, IN is only described")
    parser.add_argument(
        "--weights",
        choices=["ema", "raw", "all"],
        help="weights to convert (default: ema if IN has both); all keeps every tensor and its published name",
    )
    parser.add_argument(
        "--names", choices=NAMES, help=f"tensor names in OUT (default: {OURS}; {PUBLISHED} with --weights all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--allow-global",
        action="append",
        default=[],
        metavar="NAME",
        help="allow this global in the pickle of IN (repeatable); it may run code, so allow only trusted names",
    )
    return parser.parse_args(arguments)


def convert(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Writes OUT. Raises ValueError for invalid combinations of options, and the errors of reading and writing."""
    if options.weights != "all":
        kind = checkpoint.choose(options.weights) or options.weights or "ema"
        model = checkpoint.model(options.weights)
        save_model(model, options.out, names=options.names or OURS, weights=kind, overwrite=options.overwrite)
        return
    if OURS in (options.names, checkpoint.names):
        raise ValueError(f"--weights all keeps published names: expected --names {PUBLISHED} and a published file")
    write_tensors(checkpoint.tensors, options.out, {"names": PUBLISHED}, overwrite=options.overwrite)


if __name__ == "__main__":
    sys.exit(main())
