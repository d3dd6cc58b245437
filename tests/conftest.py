"""Tiny models and teacher text, made on the spot: no test needs a download."""

import gc
import json
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402


# The same examples in every run, so that a red run speaks of the change; `--hypothesis-profile random` draws new ones
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random")
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    # Environments, made one after the other: begun last, they would be waited for by a worker that has nothing left to do
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


def pytest_collection_finish():
    """Each training collects garbage. What the libraries made when they were imported, millions of objects, is none."""
    gc.collect()
    gc.freeze()


SENTENCES = [
    "What is the color of the sky?",
    "The sky is blue, and at night it is dark.",
    "Name a fruit that is red.",
    "An apple is red. A cherry is red too.",
    "How many legs does a dog have?",
    "A dog has four legs and one tail.",
    "Say hello to the cat.",
    "Hello, cat! How are you today?",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(directory, hidden_size=32, seed=0):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


JUDGE = """
def has_blue(prompts, completions):
    return {"blue": [float("b" in text) for text in completions]}
"""


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A Qwen2 student of 29 k random parameters, with tokenizer and chat template."""
    return build_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory):
    """A larger model with the same tokenizer."""
    return build_model(tmp_path_factory.mktemp("other"), hidden_size=48, seed=1)


@pytest.fixture(scope="session")
def standard_rows():
    return [
        {"prompt": SENTENCES[2 * i % 8], "completion": " " + SENTENCES[(2 * i + 1) % 8], "row": i} for i in range(16)
    ]


@pytest.fixture(scope="session")
def conversational_rows(standard_rows):
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
        }
        for row in standard_rows
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test saves."""
    from matplotlib.figure import Figure

    found, savefig = [], Figure.savefig

    def keep(self, *args, **kwargs):
        found.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory, standard_rows):
    """Twelve training and four test rows, and a judge."""
    folder = tmp_path_factory.mktemp("recipe")
    for split, rows in (("train", standard_rows[:12]), ("test", standard_rows[12:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "judge.py").write_text(JUDGE)
    return folder
