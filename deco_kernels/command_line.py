"""Command lines of benchmarks and programs: types of arguments, for `argparse`, and printing in any locale."""

import argparse
import io
import os
import sys
import tempfile

from deco_kernels.files import kind_at

MOST_THREADS = 1024  # tens of thousands end the process without a message


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def thread_count(text: str) -> int:
    if positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS} threads, got {text!r}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """(height, width): "256" → (256, 256), "256x384" → (256, 384)."""
    height, _, width = text.partition("x")
    return positive(height), positive(width or height)


def new_file(text: str) -> str:
    """The name of a file to write at the end, so that nothing is computed in vain.

    Its folder must exist and be writable; a file of this name may exist, but no folder, device or FIFO.
    """
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"the folder {folder} does not exist; create it first")
    if not text or (found := kind_at(text)) not in ("a file", "nothing"):
        found = f"the name of {found}: {text}" if text else "no name"
        raise argparse.ArgumentTypeError(f"expected the name of a file, got {found}; name a file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write to {folder} ({error.strerror}); choose another folder"
        ) from None
    return text


def print_any_text() -> None:
    """Lets stdout replace characters that the encoding of the locale lacks, where it would raise an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
