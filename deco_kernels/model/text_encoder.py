"""Text features of the text-to-image model: the last hidden states of a Qwen3 language model.

Source: DeCo (arXiv 2511.19365), section 4: Qwen3-1.7B, 128 positions of 2,048 features, padded on the right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from deco_kernels.model.arguments import require_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Model


class Qwen3TextEncoder(nn.Module):
    """Encodes prompts to text features [B, max_length, width] with a frozen Qwen3 model of the package transformers.

    A prompt is tokenized without a chat template and padded on the right. Padding is masked inside the language model,
    but its hidden states are part of the features. Attention is PyTorch's `scaled_dot_product_attention`, in which a
    fully masked position, such as every position of the empty prompt, attends to nothing.

    Args:
        path_or_id: folder of a Qwen3 model (config, tokenizer, weights) or its id on the Hugging Face hub, such as
            "Qwen/Qwen3-1.7B".
        max_length: positions per prompt, `text_length` of the text-to-image model.
        width: feature width, `text_width` of the text-to-image model. Wider hidden states are truncated, narrower ones
            padded with zeros.
        dtype: dtype of weights and features; None for that of the files.
        truncate: truncate prompts of more than `max_length` tokens instead of raising ValueError.

    Raises:
        ImportError: transformers is not installed.
        OSError: no model can be loaded from path_or_id, or there is no connection to the hub.
        ValueError: the model is not a Qwen3, lacks weights, or does not support `max_length`; or a size is below 1.
        TypeError: a size that is not an integer.
    """

    _empty_prompt: torch.Tensor | None

    def __init__(
        self,
        path_or_id: str | os.PathLike[str],
        max_length: int = 128,
        *,
        width: int = 2048,
        dtype: torch.dtype | None = torch.bfloat16,
        truncate: bool = False,
    ):
        super().__init__()
        require_sizes(max_length=max_length, width=width)
        self.max_length, self.width, self.truncate = max_length, width, truncate
        self.tokenizer, self.model = _load(os.fspath(path_or_id), dtype)
        longest = self.model.config.max_position_embeddings
        if max_length > longest:
            raise ValueError(
                f"max_length: expected at most {longest}, the maximum of the model, got {max_length}; "
                "choose a smaller one"
            )
        self.register_buffer("_empty_prompt", None, persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the language model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and features."""
        return self.model.dtype

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config, weights (safetensors) and tokenizer into a folder, which is created and can be `path_or_id`."""
        self.model.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    @property
    def empty_prompt(self) -> torch.Tensor:
        """Features [max_length, width] of the empty prompt (the null condition), computed once."""
        if self._empty_prompt is None:
            self._empty_prompt = self._encode([[]])[0]
        return self._empty_prompt

    def forward(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """Encode B prompts to features [B, max_length, width] on the model's device, without gradients.

        Raises:
            TypeError: a prompt that is not a string.
            ValueError: no prompts, an empty prompt (its features are `empty_prompt`), or, without `truncate`, a prompt
                of more than `max_length` tokens.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompts[{number}]: expected a string, got {type(prompt).__name__}; pass one")
            if not prompt.strip():
                raise ValueError(
                    f"prompts[{number}]: expected text, got {prompt!r}; the null condition is empty_prompt"
                )
        if not prompts:
            raise ValueError("prompts: expected at least one prompt, got none; pass one, or use empty_prompt")
        tokens = self.tokenizer(prompts)["input_ids"]
        for number, ids in enumerate(tokens):
            if len(ids) > self.max_length and not self.truncate:
                raise ValueError(
                    f"prompts[{number}]: expected at most {self.max_length} tokens, got {len(ids)}; shorten it or use "
                    "truncate=True"
                )
        return self._encode([ids[: self.max_length] for ids in tokens])

    @torch.no_grad()
    def _encode(self, tokens: list[list[int]]) -> torch.Tensor:
        """Features [B, max_length, width] of B lists of at most max_length token ids."""
        padding = self.tokenizer.pad_token_id
        shape = (len(tokens), self.max_length)
        numbers, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.int64)
        for row, ids in enumerate(tokens):
            numbers[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[row, : len(ids)] = 1
        device = self.model.device
        hidden = self.model(numbers.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        return F.pad(hidden, (0, self.width - hidden.shape[-1]))  # a negative padding truncates


def _load(path_or_id: str, dtype: torch.dtype | None) -> tuple[PreTrainedTokenizerBase, Qwen3Model]:
    """Load the tokenizer and the frozen model."""
    try:
        from transformers import AutoConfig, AutoTokenizer, Qwen3Model
    except ImportError as error:
        raise ImportError(
            "Qwen3TextEncoder needs the package transformers: pip install 'deco_kernels[text]'"
        ) from error
    try:
        kind = AutoConfig.from_pretrained(path_or_id).model_type
        if kind == "qwen3":
            tokenizer = AutoTokenizer.from_pretrained(path_or_id)
            model, info = Qwen3Model.from_pretrained(
                path_or_id,
                dtype="auto" if dtype is None else dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise OSError(
            f"path_or_id: expected a folder with config, tokenizer and weights of a Qwen3 model, or, with a connection "
            f"to the Hugging Face hub, an id such as 'Qwen/Qwen3-1.7B'; got {path_or_id!r}: {error}"
        ) from error
    if kind != "qwen3":
        raise ValueError(
            f"path_or_id: expected a model of type 'qwen3', got {path_or_id!r} of type {kind!r}; give a Qwen3 model"
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        raise ValueError(
            f"path_or_id: {path_or_id!r} has no matching weights for {', '.join(lacking[:5])}; "
            "give all files of the model"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"path_or_id: the tokenizer of {path_or_id!r} has no padding token; give the tokenizer of a Qwen3 model"
        )
    return tokenizer, model.eval().requires_grad_(False)
