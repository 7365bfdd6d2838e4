"""Names of files to write are checked before anything is computed."""

import argparse
import os

import pytest

from deco_kernels.command_line import new_file


def test_a_file_that_can_be_written(tmp_path):
    (tmp_path / "old.json").touch()
    for name in ("new.json", "old.json", "a name.json"):
        assert new_file(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_other_names_are_refused(tmp_path):
    """A FIFO or device would be replaced by a file."""
    os.mkfifo(tmp_path / "fifo")
    for name, said in (
        (f"{tmp_path}/fifo", "got the name of a FIFO"),
        (os.devnull, "got the name of a device"),
        ("", "got no name"),
        ("/proc/new.json", "cannot write to /proc"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            new_file(name)
