"""A tiny Qwen3 with random weights and a byte-level tokenizer."""

from pathlib import Path

import torch

HIDDEN = 20


def save_tiny_qwen3(folder: Path) -> Path:
    """Writes config, weights and tokenizer for `from_pretrained`; hidden states have HIDDEN channels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a red cat on a mat", "the blue sea"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        language_model = Qwen3Model(config)
        for parameter in language_model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    language_model.save_pretrained(folder)
    return folder
