"""Reading and writing of checkpoint files.

The container of a file is torch (a zip archive: .ckpt, .pt or .pth) or safetensors. Its tensors have the published
names (DeCo, arXiv 2511.19365) or the names of this package. In the latter case the file also holds the model's class
and constructor arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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
from deco_kernels.model.presets import Model

PUBLISHED, OURS = "published", "deco_kernels"
NAMES = (PUBLISHED, OURS)
WEIGHTS = {"raw": RAW, "ema": EMA}
_CONTAINERS = {".ckpt": "torch", ".pt": "torch", ".pth": "torch", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file. The tensors are memory-mapped: their values are read at first use.

    Attributes:
        path: the file.
        container: "torch" or "safetensors".
        tensors: the state_dict, with the names of the file.
        names: "published" or "deco_kernels".
        weights: "ema" or "raw" if the file states what its only set of tensors is, otherwise None.
        model_class, config: class name and constructor arguments in a file with this package's names, otherwise None.
        left_out: other entries of the file, name → type; they are not read.
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
        """Sets of weights → their tensors, with the names of the file.

        The keys are "raw" and "ema" in a file with prefixes, otherwise only `weights`, or "" if that is None.
        """
        found = {
            kind: {name: tensor for name, tensor in self.tensors.items() if str(name).startswith(prefix)}
            for kind, prefix in WEIGHTS.items()
        }
        found = {kind: tensors for kind, tensors in found.items() if tensors}
        return found or {self.weights or "": dict(self.tensors)}

    def choose(self, weights: str | None = None) -> str:
        """The key of `sets` for a request of "ema", "raw" or None (EMA if present, otherwise raw).

        Raises ValueError if the file has no such weights.
        """
        if weights not in (None, *WEIGHTS):
            raise ValueError(f"weights: expected one of {sorted(WEIGHTS)} or None, got {weights!r}; choose one of them")
        sets = self.sets
        if weights is None:
            return next(kind for kind in ("ema", "raw", "") if kind in sets)
        if weights not in sets and "" not in sets:
            raise ValueError(
                f"{self.path}: expected {weights} weights, found {', '.join(sets)} weights only; ask for those"
            )
        return weights if weights in sets else ""

    def model(self, weights: str | None = None) -> Model:
        """The model, with copies of the tensors.

        Raises as `from_published`, with the file's name in the message, and ValueError for weights that the file lacks.
        """
        kind = self.choose(weights)
        with self._named():
            if self.model_class is not None and self.config is not None:
                return from_config(self.model_class, self.config, self.tensors)
            return from_published(self.tensors, ema=kind != "raw")

    def check(self) -> dict[str, Model]:
        """The model of each of `sets`, on the meta device, without values. Raises as `model`."""
        with self._named():
            if self.model_class is not None and self.config is not None:
                return {self.weights or "": config_model_on_meta(self.model_class, self.config, self.tensors)}
            return {kind: published_model_on_meta(select(self.tensors, ema=kind != "raw")) for kind in self.sets}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path}: {error}") from None

    def summary(self) -> str:
        """Readable summary of the file, several lines. Raises as `check`."""
        lines = [f"{self.path}: {self.container} file, {self.path.stat().st_size:,} bytes, {self.names} names"]
        models = self.check()
        for kind, tensors in self.sets.items():
            lines.append(f"  {kind or 'unnamed'} weights: {_described(tensors)}")
        head = {name: tensor for name, tensor in self.tensors.items() if name.startswith(ALIGNMENT_HEAD)}
        if head:
            lines.append(f"  alignment head: {_described(head)}")
        if self.left_out:
            entries = ", ".join(f"{name} ({kind})" for name, kind in self.left_out.items())
            lines.append(f"  not read: {entries}")
        for description in dict.fromkeys(map(_model_described, models.values())):
            lines.append(f"  model: {description}")
        return "\n".join(lines)


def _described(tensors: Mapping[str, torch.Tensor]) -> str:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {count:,} values, {', '.join(dtypes)}"


def _model_described(model: Model) -> str:
    config = ", ".join(f"{name}={value!r}" for name, value in model.config.items())
    return f"{type(model).__name__}({config})"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str], *, allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Read a torch archive (with weights_only) or a safetensors file; both are memory-mapped.

    The container is detected from the content, not from the name.

    Args:
        path: the file.
        allow_globals: names such as "package.module.Class" that the pickle of a torch archive may refer to in addition
            to those that weights_only loading allows. They are imported and may run when the file is read, so allow
            only trusted ones.

    Raises:
        ValueError: neither container; truncated or damaged; a torch archive without a state_dict; or one whose pickle
            refers to other globals (the message lists them).
        FileNotFoundError, IsADirectoryError, OSError: no file at the path.
        ImportError: a global that cannot be imported, or safetensors is not installed.
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
        f"{path}: expected a torch archive (as written by torch.save) or a safetensors file, got neither; the file is "
        "empty, damaged at its start, or of another format; check the path, or copy the file again"
    )


def load_model(path: str | os.PathLike[str], *, weights: str | None = None, allow_globals: Sequence[str] = ()) -> Model:
    """Load the model of a file on the CPU.

    Args:
        path, allow_globals: as in `read_checkpoint`.
        weights: "ema", "raw", or None for EMA if present, otherwise raw.

    Raises as `read_checkpoint` and `Checkpoint.model`.
    """
    return read_checkpoint(path, allow_globals=allow_globals).model(weights)


def _read_torch(path: Path, allow_globals: Sequence[str]) -> Checkpoint:
    content = _unpickle(path, allow_globals)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a dictionary with a state_dict, got {type(content).__name__}; "
            "save the state_dict of a model"
        )
    if not isinstance(content.get("state_dict"), Mapping):
        content = {"state_dict": content}
    state = dict(content["state_dict"])
    empty = [str(name) for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if empty:
        raise ValueError(
            f"{path}: expected tensors with values, got tensors on the meta device: {', '.join(empty)}; write the file "
            "again from an initialized or loaded model"
        )
    own = content.get(OURS)
    left_out = {str(k): type(v).__name__ for k, v in content.items() if k not in ("state_dict", OURS)}
    description = _read_description(path, own) if own is not None else {}
    return Checkpoint(path, "torch", state, left_out=left_out, **description)


def _unpickle(path: Path, allow_globals: Sequence[str]) -> Any:
    """The content of a torch archive, with memory-mapped tensors."""
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_import(name), name) for name in allow_globals
    ]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            blocked = _blocked_globals(path)
            if not blocked:
                raise ValueError(
                    f"{path}: its pickle is damaged or not plain data ({_first_line(error)}); "
                    "copy it again, or save a state_dict alone"
                ) from None
            raise ValueError(
                f"{path}: its pickle refers to {', '.join(blocked)}, which may run code when the file is read; nothing "
                f"was loaded. If you trust them, allow them by name (--allow-global {blocked[0]}, "
                f'allow_globals=["{blocked[0]}"]); those of os, posix, sys and similar modules are never allowed'
            ) from None
        except Exception as error:  # a damaged archive can raise almost any exception
            raise ValueError(
                f"{path}: the torch archive is truncated or damaged ({_first_line(error)}); copy it again"
            ) from None


def _blocked_globals(path: Path) -> list[str]:
    """Globals in the pickle of a torch archive that are not allowed; empty if it is too damaged to be read."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # see _unpickle
        return []


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return lines[0][:200] if lines else type(error).__name__


def _import(name: str) -> Any:
    """The object with a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"allow_globals: {name} cannot be imported ({error}); install the package that defines it"
        ) from None


def _read_safetensors(path: Path) -> Checkpoint:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: the safetensors file is truncated or damaged ({error}); copy it again") from None
    description = _read_description(path, metadata) if metadata.get("names") in NAMES else {}
    return Checkpoint(path, "safetensors", tensors, **description)


def _read_description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description in a file that this package wrote, as attributes of `Checkpoint`."""
    if not isinstance(metadata, Mapping):
        raise ValueError(
            f"{path}: its description of the model is damaged ({metadata!r}); write the file again from its model"
        )
    names, weights = metadata.get("names"), metadata.get("weights")
    description: dict[str, Any] = {"names": names, "weights": weights}
    if names == OURS:
        try:
            description |= {"model_class": metadata["model"], "config": json.loads(metadata["config"])}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: its description of the model is damaged ({error!r}); write the file again from its model"
            ) from None
    if names not in NAMES or weights not in (None, *WEIGHTS) or not isinstance(description.get("config", {}), dict):
        raise ValueError(
            f"{path}: its description is not in the form that this version writes: {dict(metadata)}; "
            "read it with the version that wrote it, or write it again"
        )
    return description


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"safetensors files need the package safetensors: pip install safetensors ({error})"
        ) from None
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
    """Write a model to a file.

    The file appears under its name only when it is complete. If `path` is a symbolic link, its target is written and
    the link stays.

    Args:
        model: DeCo, DeCoTextToImage or DiT.
        path: the file. Its suffix selects the container: .ckpt, .pt or .pth (torch), or .safetensors.
        names: "deco_kernels", with class and constructor arguments, or "published". Published names have the prefix of
            the weights ("ema_denoiser." or "denoiser.") in a torch file and none in a safetensors file.
        weights: "ema" or "raw", the kind of the model's weights; recorded in the file.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        OSError: the file cannot be written.
        TypeError: another model.
        ValueError: an invalid suffix, `names` or `weights`.
    """
    if names not in NAMES:
        raise ValueError(f"names: expected one of {list(NAMES)}, got {names!r}; choose one of them")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {sorted(WEIGHTS)}, got {weights!r}; choose one of them")
    description = {"names": names, "weights": weights}
    published = to_published(model, WEIGHTS[weights] if container_of(path) == "torch" else "")
    if names == OURS:
        description |= {"model": type(model).__name__, "config": json.dumps(model.config, default=operator.index)}
    write_tensors(published if names == PUBLISHED else model.state_dict(), path, description, overwrite=overwrite)


def container_of(path: str | os.PathLike[str]) -> str:
    """The container that the suffix of a name selects. Raises ValueError for other suffixes."""
    container = _CONTAINERS.get(Path(path).suffix)
    if container is None:
        raise ValueError(
            f"{path}: expected a name with suffix {', '.join(_CONTAINERS)}, which selects the container; "
            "choose such a name"
        )
    return container


def write_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    description: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write tensors under their names, with the description of the file; replaces and raises as `save_model`."""
    path, container = Path(path), container_of(path)
    tensors = {name: _compact(tensor.detach()) for name, tensor in tensors.items()}
    with complete_or_absent(path, overwrite) as temporary:
        if container == "safetensors":
            _safetensors().torch.save_file(tensors, temporary, metadata={"format": "pt", **description})
        else:
            own = {OURS: dict(description)} if description.get("names") == OURS else {}
            with open(temporary, "wb") as file:
                torch.save({**own, "state_dict": tensors}, file)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless it is contiguous and fills its storage: torch.save writes whole storages."""
    compact = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if compact else tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def complete_or_absent(path: Path, overwrite: bool) -> Iterator[Path]:
    """An empty temporary file beside `path`, which is renamed to it at the end and removed after an error.

    Its permissions follow the umask, even if the writer sets others (safetensors: owner only). If `path` is a symbolic
    link, the temporary file is beside its target and the link stays.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(f"{path}: cannot be written (its symbolic links form a loop); choose another path")
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
            raise OSError(
                f"{path}: cannot be written ({_first_line(error)}); no partial file remains; "
                "choose another place, or free disk space"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # a read-only file system has already raised above
            temporary.unlink(missing_ok=True)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if (found := kind_at(path)) not in ("a file", "nothing"):  # a FIFO or device would be replaced
        raise OSError(f"{path}: cannot be written (it is {found}); choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists; choose another name or pass overwrite")
