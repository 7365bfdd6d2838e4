"""What lies at a path, found out without opening it."""

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
    """What a path leads to: "a file", "nothing", "a folder", "a FIFO", "a socket" or "a device".

    To be asked before a file is opened that others have named: opening a FIFO waits for its writer, without end.
    """
    try:
        return _KINDS[stat.S_IFMT(os.stat(path).st_mode)]
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
