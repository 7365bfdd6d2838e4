"""Folders and repositories of models, as huggingface_hub's mixin reads and writes them. Needs huggingface_hub."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from deco_kernels.model.checkpoint import from_config
from deco_kernels.model.checkpoint_file import read_checkpoint, save_model
from deco_kernels.model.pretrained import PretrainedModel

CONFIG, TENSORS = "config.json", "model.safetensors"

Pretrained = TypeVar("Pretrained", bound=PretrainedModel)


class HubModel(  # type: ignore[call-arg]
    PyTorchModelHubMixin,
    library_name="deco_kernels",
    paper_url="https://arxiv.org/abs/2511.19365",
    tags=["deco", "pixel-diffusion"],
):
    """A model as the mixin sees it: its files are those of `save_model`, its config is `model.config`."""

    def __init__(self, model: PretrainedModel):
        self.model = model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write config, tensors and a model card; see `PretrainedModel.save_pretrained`."""
        options["config"] = self.model.config
        return super().save_pretrained(Path(save_directory), **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model; see `PretrainedModel.push_to_hub`."""
        with _one_line(f"repo_id: {repo_id!r} cannot be written"):
            return super().push_to_hub(repo_id, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.model, save_directory / TENSORS, overwrite=True)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, model_class: str, config: dict[str, Any], **options: Any) -> HubModel:
        """The model of class `model_class` in the folder `model_id`, of which the mixin has read the config."""
        path = Path(model_id) / TENSORS
        checkpoint = read_checkpoint(path)
        if checkpoint.model_class not in (None, model_class):
            raise ValueError(
                f"{path}: expected a {model_class}, got a {checkpoint.model_class}; use "
                f"{checkpoint.model_class}.from_pretrained"
            )
        try:
            return cls(from_config(model_class, config, checkpoint.tensors).eval())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{model_id}: {error}") from None


def load_pretrained(cls: type[Pretrained], path_or_id: str | os.PathLike[str], **options: Any) -> Pretrained:
    """The model of class `cls`; see `PretrainedModel.from_pretrained`."""
    folder = folder_of(path_or_id, [CONFIG, TENSORS], **options)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: expected a file of a saved {cls.__name__}, found none; "
                "check the path, or save the model there"
            )
    try:
        fits = isinstance(json.loads((folder / CONFIG).read_text(encoding="utf-8")), dict)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{folder / CONFIG}: expected a JSON object, the constructor arguments of a {cls.__name__}; "
            "save the model there again"
        )
    model: Any = HubModel.from_pretrained(folder, model_class=cls.__name__).model
    return model


def folder_of(
    path_or_id: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **unknown: Any,
) -> Path:
    """The given folder, or that of a repository on the hub with the files that match `patterns`, downloaded.

    Args:
        path_or_id: a folder or the id "user/name" of a repository.
        revision, token, cache_dir, local_files_only, force_download: as in `huggingface_hub.snapshot_download`.

    Raises OSError in one line if there is neither a folder nor a repository that can be reached, and TypeError for
    other options.
    """
    if unknown:
        raise TypeError(
            "from_pretrained: expected options among revision, token, cache_dir, local_files_only and force_download, "
            f"got {', '.join(unknown)}; leave out what is not one of them, and convert the loaded model with .to()"
        )
    if os.path.isdir(path_or_id):
        return Path(path_or_id)
    expected = (
        "path_or_id: expected a folder, or with a connection to the Hugging Face hub the id of a repository such as "
        f"'user/name', got {os.fspath(path_or_id)!r}"
    )
    with _one_line(expected):
        return Path(
            snapshot_download(
                os.fspath(path_or_id),
                allow_patterns=list(patterns),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )


def upload_folder(repo_id: str, folder: Path, **options: Any) -> str:
    """Upload a folder to a repository of the hub, which is created if needed, and return the URL of the commit.

    Args:
        repo_id: "user/name".
        options: private, token and commit_message.

    Raises OSError in one line if the repository cannot be written.
    """
    api = HfApi(token=options.pop("token", None))
    with _one_line(f"repo_id: {repo_id!r} cannot be written"):
        created = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=created, folder_path=folder, **options))


@contextlib.contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """Turn errors of the hub and of the connection to it into an OSError of one line."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{problem} ({type(error).__name__}: {reason}); without a connection copy the folder by other means"
        ) from error
