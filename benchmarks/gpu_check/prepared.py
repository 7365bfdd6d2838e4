"""Prepared archives: the CUDA module and the compiled Triton kernels of a check. `prepare` writes them.

An archive is a .tar.xz with

    manifest.json            versions for which it was built, digest of the sources, names of the kernels
    triton/KEY/...           Triton's cache: kernels and their launchers
    module/_native_cuda*.so  the CUDA module
    programs/probes-*        the probes of single instructions
"""

import hashlib
import io
import json
import lzma
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.running import ROOT

FOLDERS = {"module": ROOT / "deco_kernels", "programs": ROOT / "build" / "gpu_check"}
"""Folder of an archive -> where its files are installed."""
_GROUP = "__grp__"  # Triton's files with the paths of a kernel's other files
_SOURCES = ("csrc", "deco_kernels/backends/triton")
_TEXTS = {".source", ".ttir", ".ttgir", ".llir", ".ptx"}
_DAMAGES = (EOFError, lzma.LZMAError, tarfile.TarError)


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def triton_version() -> str | None:
    """Version of the installed Triton, or None."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def sources_digest() -> str:
    """SHA-256 of the names and contents of the sources of all kernels."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(repr((str(path.relative_to(ROOT)), path.read_bytes())).encode())
    return digest.hexdigest()


def write(path: Path, architecture: str, kernels: list[str], cache: Path, files: dict[str, Path]) -> None:
    """Packs the files of Triton's cache, and one file for each folder of the archive in `files`."""
    manifest = {
        "python": python_version(),
        "triton": triton_version(),
        "architecture": architecture,
        "sources": sources_digest(),
        "kernels": kernels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz", preset=2) as archive:
        _add_bytes(archive, "manifest.json", json.dumps(manifest, indent=1).encode())
        for folder, file in files.items():
            archive.add(file, f"{folder}/{file.name}")
        for file in sorted(cache.glob("*/*")):
            name = f"triton/{file.parent.name}/{file.name}"
            if file.suffix in _TEXTS:  # a launch loads them with the kernel but uses only its binary
                _add_bytes(archive, name, b"")
            elif file.is_file() and file.name != "lock":
                archive.add(file, name)


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of an archive. Raises ValueError if the file is not an archive of `prepare`."""
    try:
        with tarfile.open(path) as archive:
            file = archive.extractfile("manifest.json")
            assert file is not None
            return json.load(file)
    except (OSError, *_DAMAGES, KeyError, AssertionError, json.JSONDecodeError) as error:
        raise ValueError(f"--prepared {path}: not an archive of `gpu_check prepare` ({error})") from error


def mismatch(manifest: dict[str, Any], architecture: str) -> str | None:
    """What differs between an archive and this machine, with remedy, or None."""
    here = {"python": python_version(), "triton": triton_version(), "architecture": architecture}
    wrong = [f"{name} {manifest[name]}, here {there}" for name, there in here.items() if manifest[name] != there]
    if wrong:
        wanted = f"--python {here['python']} --triton {here['triton']} --arch {architecture}"
        return f"it was prepared for {'; '.join(wrong)}; prepare another with {wanted}"
    if manifest["sources"] != sources_digest():
        return "its kernels were built from other sources; prepare another from this tree"
    return None


def unpack(path: Path, architecture: str, cache: Path) -> dict[str, Any]:
    """Replaces Triton's cache in the folder `cache` by that of an archive, and installs its other files.

    Returns the manifest. Raises ValueError if the archive does not fit this machine or is damaged.
    """
    manifest = read_manifest(path)
    reason = mismatch(manifest, architecture)
    if reason is not None:
        raise ValueError(f"--prepared {path}: {reason}")
    shutil.rmtree(cache, ignore_errors=True)
    try:
        _install(path, {**FOLDERS, "triton": cache})
    except _DAMAGES as error:
        raise ValueError(f"--prepared {path}: the archive is damaged ({error}); copy or prepare it again") from error
    for group in cache.glob(f"*/{_GROUP}*.json"):
        files = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in files}}))
    return manifest


def _install(path: Path, folders: dict[str, Path]) -> None:
    with tarfile.open(path) as archive:
        for entry in archive:
            folder, _, name = entry.name.partition("/")
            target = folders.get(folder)
            if target is not None and ".." not in name:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(archive.extractfile(entry).read())
                (target / name).chmod(entry.mode)
