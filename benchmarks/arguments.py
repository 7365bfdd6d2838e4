"""Arguments of the command lines; imports nothing that takes time."""

import argparse
import os


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def new_file(text: str) -> str:
    """The name of a file to write at the end: found wrong before anything is measured."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"the folder {folder} does not exist; create it first")
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected the name of a file, found the folder {text}; name a file in it")
    return text
