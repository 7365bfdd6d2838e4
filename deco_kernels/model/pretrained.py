"""Models in folders and in repositories of the Hugging Face hub, through huggingface_hub, imported at first use."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

Pretrained = TypeVar("Pretrained", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """Base class of the models: the methods of huggingface_hub's PyTorchModelHubMixin.

    A folder or repository holds `config.json`, the constructor arguments, and `model.safetensors`, which
    `model.load_model` reads too.
    """

    config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.parameters()).dtype

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write the model into a folder, which is created; existing files of the model are replaced.

        Args:
            save_directory: the folder.
            options: those of PyTorchModelHubMixin.save_pretrained, such as push_to_hub, repo_id and private.

        Returns:
            With `push_to_hub` the URL of the commit, otherwise None.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            OSError: the folder cannot be written, or the hub cannot be reached.
        """
        return _hub().HubModel(self).save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to a repository of the hub and return the URL of the commit.

        Args:
            repo_id: "user/name"; created if it does not exist.
            options: those of PyTorchModelHubMixin.push_to_hub, such as private, branch, token and commit_message.

        Raises as `save_pretrained`.
        """
        return _hub().HubModel(self).push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls: type[Pretrained], path_or_id: str | os.PathLike[str], **options: Any) -> Pretrained:
        """Load a model of this class, in evaluation mode, on the CPU. No code from the folder runs.

        Args:
            path_or_id: a folder that `save_pretrained` has written, or the id "user/name" of a repository on the hub.
            options: revision, token, cache_dir, local_files_only and force_download of huggingface_hub.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            OSError: no folder of this name, and no connection to the hub or no such repository; or files are missing.
            ValueError: files of another model, or that do not fit each other.
        """
        return _hub().load_pretrained(cls, path_or_id, **options)


def _hub() -> ModuleType:
    """The module that imports huggingface_hub."""
    try:
        return importlib.import_module("deco_kernels.model.hub")
    except ImportError as error:
        raise ImportError(
            f"save_pretrained, from_pretrained and push_to_hub need huggingface_hub: pip install 'deco_kernels[hub]' "
            f"({error})"
        ) from error
