"""Locates programs of the CUDA toolkit."""

import os
import shutil


def cuda_tool(name: str) -> str | None:
    """Path of a program on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=os.path.join(home, "bin"))
