"""Arguments of the command lines; imports nothing that takes time."""

import argparse
import os


def positive(text: str) -> int:
    """The number, for argparse; raises ArgumentTypeError unless it is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def new_file(text: str) -> str:
    """The name of a file to write at the end, for argparse: ArgumentTypeError before anything is measured.

    Its folder must exist, and the name must not be that of a folder.
    """
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"the folder {folder} does not exist; create it first")
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected the name of a file, found the folder {text}; name a file in it")
    return text
