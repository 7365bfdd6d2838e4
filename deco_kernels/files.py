"""File types, determined without opening the file."""

from __future__ import annotations

import os
import stat

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_at(path: str | os.PathLike[str]) -> str:
    """Type of the file at a path: "a file", "nothing", "a folder", "a FIFO", "a socket" or "a device".

    Check paths given by users before opening them: opening a FIFO blocks until a process writes to it.
    """
    try:
        return _KINDS[stat.S_IFMT(os.stat(path).st_mode)]
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
