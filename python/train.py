"""Trains a DeCo on a folder of images, a table or shards, as configured by a YAML file.

    python python/train.py python/configs/small.yaml data.path=PHOTOGRAPHS out=runs/small
    torchrun --nproc_per_node 8 python/train.py python/configs/deco_l.yaml data.path=IMAGENET/train out=runs/l

KEY=VALUE overrides any key of the configuration; nested keys use dots. A run that was stopped or killed continues with
the same command and --resume auto.

Exit status: 0; 2 if configuration, data or checkpoint cannot be used, a checkpoint cannot be written, or the loss is
not finite (with one line on stderr); 130 if interrupted.
"""

import argparse
import sys
from pathlib import Path

from command_line.failures import exit_status, importing

PACKAGES = "'deco_kernels[train]'"
with importing(PACKAGES):
    from deco_kernels.training import config as configuration
    from deco_kernels.training import paths


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    overrides = options.override + ([] if options.backend is None else [f"backend={options.backend}"])

    def run() -> None:
        config = configuration.load(options.config, overrides)
        paths.check(config, options.resume)
        with importing(PACKAGES):
            from deco_kernels.training import loop  # takes seconds: imported after what can be checked without

        loop.train(config, options.resume)

    return exit_status(run, options.debug, "interrupted; the same command with --resume auto continues")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file, see python/configs and docs/training.md")
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="overrides a key of the file")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|FILE",
        help="continue from the newest checkpoint of the run, or from FILE",
    )
    parser.add_argument("--backend", help="backend of the fused ops; reference is plain PyTorch")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
