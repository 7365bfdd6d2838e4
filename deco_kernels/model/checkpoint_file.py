"""Files of checkpoints: published .ckpt files, safetensors, and this package's own form of either; read and written.

A file has a container, torch (a zip archive, .ckpt, .pt or .pth) or safetensors, and names its tensors as published
(DeCo, arXiv 2511.19365) or as this package does; the latter also holds the model's class and constructor arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deco_kernels.files import kind_at
from deco_kernels.model.checkpoint import (
    ALIGNMENT_HEAD,
    EMA,
    RAW,
    config_model_on_meta,
    from_config,
    from_published,
    published_model_on_meta,
    select,
    to_published,
)

PUBLISHED, OURS = "published", "deco_kernels"
NAMES = (PUBLISHED, OURS)
WEIGHTS = {"raw": RAW, "ema": EMA}
_CONTAINERS = {".ckpt": "torch", ".pt": "torch", ".pth": "torch", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. The tensors are memory-mapped: their values are read when they are used.

    Attributes:
        path: the file. container: "torch" or "safetensors".
        tensors: the state_dict under the names of the file.
        names: "published" or "deco_kernels".
        weights: "ema" or "raw" where the file says what its only set of tensors is, otherwise None.
        model_class, config: of a file with this package's names, otherwise None.
        left_out: other entries of the file, name → type; they are not looked at.
    """

    path: Path
    container: str
    tensors: Mapping[str, torch.Tensor]
    names: str = PUBLISHED
    weights: str | None = None
    model_class: str | None = None
    config: Mapping[str, Any] | None = None
    left_out: Mapping[str, str] | None = None

    @property
    def sets(self) -> dict[str, dict[str, torch.Tensor]]:
        """The models' weights in it, "raw" and "ema" or what `weights` says ("" where it does not), and their tensors;
        names as in the file."""
        found = {
            kind: {name: tensor for name, tensor in self.tensors.items() if str(name).startswith(prefix)}
            for kind, prefix in WEIGHTS.items()
        }
        found = {kind: tensors for kind, tensors in found.items() if tensors}
        return found or {self.weights or "": dict(self.tensors)}

    def choose(self, weights: str | None = None) -> str:
        """Which of `sets` a request for "ema", "raw" or None (averaged rather than raw) means. ValueError if it is not
        there."""
        if weights not in (None, *WEIGHTS):
            raise ValueError(f"weights: expected one of {sorted(WEIGHTS)} or None, got {weights!r}")
        sets = self.sets
        if weights is None:
            return next(kind for kind in ("ema", "raw", "") if kind in sets)
        if weights not in sets and "" not in sets:
            raise ValueError(f"{self.path}: expected {weights} weights, found {', '.join(sets)} weights only")
        return weights if weights in sets else ""

    def model(self, weights: str | None = None) -> nn.Module:
        """The model, with copies of the tensors. Raises what `from_published` raises, naming the file, and ValueError
        for weights that are not there."""
        kind = self.choose(weights)
        with self._named():
            if self.names == OURS:
                return from_config(self.model_class, self.config, self.tensors)
            return from_published(self.tensors, ema=kind != "raw")

    def check(self) -> dict[str, nn.Module]:
        """For each of `sets` the model that it fits, on the meta device. Raises as `model` does."""
        with self._named():
            if self.names == OURS:
                return {self.weights or "": config_model_on_meta(self.model_class, self.config, self.tensors)}
            return {kind: published_model_on_meta(select(self.tensors, ema=kind != "raw")) for kind in self.sets}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path}: {error}") from None

    def summary(self) -> str:
        """Lines that say what was found; raises as `check` does."""
        lines = [f"{self.path}: {self.container} file, {self.path.stat().st_size:,} bytes, {self.names} names"]
        models = self.check()
        for kind, tensors in self.sets.items():
            lines.append(f"  {kind or 'unnamed'} weights: {_described(tensors)}")
        head = {name: tensor for name, tensor in self.tensors.items() if name.startswith(ALIGNMENT_HEAD)}
        if head:
            lines.append(f"  alignment head: {_described(head)}")
        if self.left_out:
            entries = ", ".join(f"{name} ({kind})" for name, kind in self.left_out.items())
            lines.append(f"  not looked at: {entries}")
        for description in dict.fromkeys(map(_model_described, models.values())):
            lines.append(f"  model: {description}")
        return "\n".join(lines)


def _described(tensors: Mapping[str, torch.Tensor]) -> str:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {count:,} values, {', '.join(dtypes)}"


def _model_described(model: nn.Module) -> str:
    config = ", ".join(f"{name}={value!r}" for name, value in model.config.items())
    return f"{type(model).__name__}({config})"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str], *, allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Read a file, whatever it is called: torch archives with weights_only, safetensors; both memory-mapped.

    Args:
        allow_globals: names such as "package.module.Class" that the pickle of a torch archive may refer to beside what
            weights_only loading allows. They are imported. Admit only what you know: it may run when the file is read.

    Raises:
        ValueError: neither container, truncated or damaged, a torch archive whose pickle refers to other globals (the
            message lists them), or one without a state_dict.
        FileNotFoundError, IsADirectoryError, OSError: no file at the path.
        ImportError: a global that cannot be imported, safetensors missing.
    """
    path = Path(path)
    if (found := kind_at(path)) != "a file":
        kind = {"nothing": FileNotFoundError, "a folder": IsADirectoryError}.get(found, OSError)
        raise kind(f"{path}: expected a checkpoint file, found {found}; check the path")
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(path, allow_globals)
    if start[8:] == b"{":
        return _read_safetensors(path)
    raise ValueError(
        f"{path}: expected a torch archive (as torch.save writes it) or a safetensors file, got neither; it is empty, "
        "damaged before its first bytes, or something else"
    )


def load_model(
    path: str | os.PathLike[str], *, weights: str | None = None, allow_globals: Sequence[str] = ()
) -> nn.Module:
    """The model that a file holds, on the CPU. `weights`: "ema", "raw", or None for averaged rather than raw. Raises as
    `read_checkpoint` and `Checkpoint.model` do."""
    return read_checkpoint(path, allow_globals=allow_globals).model(weights)


def _read_torch(path: Path, allow_globals: Sequence[str]) -> Checkpoint:
    content = _unpickle(path, allow_globals)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary with a state_dict, got {type(content).__name__}")
    if not isinstance(content.get("state_dict"), Mapping):
        content = {"state_dict": content}
    state = dict(content["state_dict"])
    empty = [str(name) for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if empty:
        raise ValueError(
            f"{path}: expected tensors with values, got some of the meta device, which have none: {', '.join(empty)}; "
            "write it again from a model that is initialised or loaded"
        )
    own = content.get(OURS)
    left_out = {str(k): type(v).__name__ for k, v in content.items() if k not in ("state_dict", OURS)}
    said = _said(path, own) if own is not None else {}
    return Checkpoint(path, "torch", state, left_out=left_out, **said)


def _unpickle(path: Path, allow_globals: Sequence[str]):
    """The content of a torch archive, tensors memory-mapped."""
    allowed = [(_import(name), name) for name in allow_globals]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            blocked = _blocked_globals(path)
            if not blocked:
                raise ValueError(f"{path}: its pickle is damaged or no plain data ({_first_line(error)})") from None
            raise ValueError(
                f"{path}: its pickle refers to {', '.join(blocked)}, which may run code when the file is read; nothing "
                f"was loaded. If you know and trust them, admit them by name (--allow-global {blocked[0]}, "
                f'allow_globals=["{blocked[0]}"]); those of os, posix, sys and the like are never admitted'
            ) from None
        except Exception as error:  # a damaged archive makes its readers raise nearly anything
            raise ValueError(
                f"{path}: the torch archive is truncated or damaged ({_first_line(error)}); copy it again"
            ) from None


def _blocked_globals(path: Path) -> list[str]:
    """What the pickle of a torch archive refers to beyond what is allowed; empty if it is too damaged to tell."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above
        return []


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return lines[0][:200] if lines else type(error).__name__


def _import(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"allow_globals: {name} cannot be imported ({error}); install what defines it, or remove it from the file"
        ) from None


def _read_safetensors(path: Path) -> Checkpoint:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: the safetensors file is truncated or damaged ({error}); copy it again") from None
    said = _said(path, metadata) if metadata.get("names") in NAMES else {}
    return Checkpoint(path, "safetensors", tensors, **said)


def _said(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file that this package wrote says of itself, as attributes of `Checkpoint`."""
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{path}: its description of the model is damaged ({metadata!r})")
    names, weights = metadata.get("names"), metadata.get("weights")
    said: dict[str, Any] = {"names": names, "weights": weights}
    if names == OURS:
        try:
            said |= {"model_class": metadata["model"], "config": json.loads(metadata["config"])}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: its description of the model is damaged ({error!r})") from None
    if names not in NAMES or weights not in (None, *WEIGHTS) or not isinstance(said.get("config", {}), dict):
        raise ValueError(f"{path}: its description is not one that this version writes: {dict(metadata)}")
    return said


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"safetensors files need a package: pip install safetensors ({error})") from None
    return safetensors


# --- writing ---------------------------------------------------------------------------------------------------------


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    names: str = OURS,
    weights: str = "ema",
    overwrite: bool = False,
) -> None:
    """Write a model; the container follows from the ending: .ckpt, .pt, .pth (torch) or .safetensors.

    Args:
        model: DeCo, DeCoTextToImage or DiT.
        names: "deco_kernels", with class and constructor arguments, or "published". Published names bear the prefix of
            the weights ("ema_denoiser." or "denoiser.") in a torch file and none in a safetensors file.
        weights: "ema" or "raw", what the model's weights are; written down.
        overwrite: replace an existing file.

    The file appears under its name when it is complete, or not at all. Where the name is a symbolic link, the file that
    it leads to is written, and the link stays. Raises FileExistsError, OSError when it cannot be written, TypeError for
    another model, ValueError for another ending, `names` or `weights`.
    """
    if names not in NAMES:
        raise ValueError(f"names: expected one of {list(NAMES)}, got {names!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {sorted(WEIGHTS)}, got {weights!r}")
    said = {"names": names, "weights": weights}
    published = to_published(model, WEIGHTS[weights] if container_of(path) == "torch" else "")
    if names == OURS:
        said |= {"model": type(model).__name__, "config": json.dumps(model.config, default=operator.index)}
    write_tensors(published if names == PUBLISHED else model.state_dict(), path, said, overwrite=overwrite)


def container_of(path: str | os.PathLike[str]) -> str:
    """The container that the ending of a name asks for; ValueError for other endings."""
    container = _CONTAINERS.get(Path(path).suffix)
    if container is None:
        raise ValueError(f"{path}: expected a name that ends with {', '.join(_CONTAINERS)}, to say what to write")
    return container


def write_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    said: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write tensors under their names, and what the file says of itself; whole, or not at all, as `save_model`."""
    path, container = Path(path), container_of(path)
    tensors = {name: _compact(tensor.detach()) for name, tensor in tensors.items()}
    with complete_or_absent(path, overwrite) as temporary:
        if container == "safetensors":
            _safetensors().torch.save_file(tensors, temporary, metadata={"format": "pt", **said})
        else:
            own = {OURS: dict(said)} if said.get("names") == OURS else {}
            with open(temporary, "wb") as file:
                torch.save({**own, "state_dict": tensors}, file)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and with a storage of its own, so that no file holds more than the tensors."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def complete_or_absent(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside `path`, empty: renamed to it at the end, removed after an error. Who may read it follows
    from the umask, whatever its writer asks for (safetensors: the owner alone).

    Where `path` is a symbolic link, all of this happens beside the file that it leads to, and the link stays.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(f"{path}: cannot be written (its symbolic links lead in a circle)")
    _refuse_existing(path, overwrite)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _refuse_existing(path, overwrite)
        os.replace(temporary, target)
    except FileExistsError:
        raise
    except Exception as error:
        if isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: cannot be written ({_first_line(error)}); nothing was left behind") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # of a read-only file system, which the writer has met already
            temporary.unlink(missing_ok=True)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists; choose another name, or overwrite it explicitly")
