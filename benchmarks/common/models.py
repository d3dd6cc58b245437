"""Small models with random weights."""

from transformers import LlamaConfig


def llama_config(tokenizer, hidden_size: int, layers: int, width: int, **settings) -> LlamaConfig:
    """Of the tokenizer's vocabulary; feed-forward layers are `width` times as wide as the others."""
    return LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": width * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
    )
