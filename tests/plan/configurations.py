"""Folders with a config.json and nothing else: all that a plan reads of a model."""

import yaml
from transformers import LlamaConfig, Qwen2Config


SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "7B": (3584, 18944, 28, 28, 4),
    "72B": (8192, 29568, 80, 64, 8),
}


def qwen(folder, name: str) -> str:
    """As `benchmarks/gpu_steps.py` builds them, and one of 80 layers."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[name]
    Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=name in ("0.5B", "1.5B"),
    ).save_pretrained(folder / name)
    return str(folder / name)


def llama(folder) -> str:
    """As `benchmarks/gad_memory.py --hidden_size 2048 --num_layers 16` builds it."""
    LlamaConfig(
        vocab_size=260,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ).save_pretrained(folder / "llama")
    return str(folder / "llama")


def write_recipe(folder, **values):
    values = {
        "method": "gad",
        "dataset_name": "rows",
        "output_dir": str(folder / "out"),
        "max_prompt_length": 256,
        "max_completion_length": 256,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "num_generations": 8,
        "beta": 0.0,
        **values,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path
