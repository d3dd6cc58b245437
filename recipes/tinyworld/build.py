"""
Make every file of the small world: the teacher's answers, the base student, the base discriminator and the proxy.

    python recipes/tinyworld/build.py [--out DIR]   write the files (default: beside this script)
    python recipes/tinyworld/build.py --check       build them again elsewhere and compare byte for byte

The three models are language models trained from scratch on careless stories of the same world, so that they know its
words but hardly ever answer a prompt correctly. They are trained in float64 throughout and then rounded to 12 bits, so
that processors which add in another order still write the same bytes. Takes about ten minutes on one core.
"""

import argparse
import filecmp
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm


sys.path.insert(0, str(Path(__file__).parent))
import world  # noqa: E402


HERE = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS, ANSWERED_TWICE = 4000, 256, 400
CARELESS = 0.3  # share of numbers in the web text that are drawn at random
MANTISSA_BITS = 12
MAX_LENGTH = 64

STUDENT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DISCRIMINATOR = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PROXY = DISCRIMINATOR  # as large, but trained for longer: it has learned to count, as carelessly as its text


def teacher_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows; no prompt of one is in the other, and test prompts are distinct."""
    rng = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < TEST_ROWS + TRAIN_ROWS - ANSWERED_TWICE:
        prompts[world.make_prompt(rng)] = None
    test, train = list(prompts)[:TEST_ROWS], list(prompts)[TEST_ROWS:]
    train += rng.sample(train, ANSWERED_TWICE)
    rng.shuffle(train)

    def answer(prompt: str) -> dict[str, str]:
        return {"prompt": prompt, "completion": " " + world.sample_answer(prompt, rng)}

    return [answer(prompt) for prompt in train], [answer(prompt) for prompt in test]


def web_text(rng: random.Random) -> str:
    """A story such as the teacher's, told carelessly: the words are right, the numbers often are not."""
    prompt = world.make_prompt(rng)
    words = world.sample_answer(prompt, rng).split()
    careless = [
        str(rng.randint(0, world.MAX_COUNT)) if word.isdigit() and rng.random() < CARELESS else word for word in words
    ]
    return " ".join([prompt, *careless])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; a text gets no special token, so a prompt's tokens begin those of prompt and answer."""
    words = set("to the he she has now that makes so goes home with in end keeps takes after then and , .".split())
    words |= set(world.NAMES) | set(world.PLACES) | {str(n) for n in range(world.MAX_COUNT + 1)}
    words |= set(world.THINGS) | set(world.THINGS.values())
    words |= {form for verbs in world.PLACES.values() for verb in verbs for form in (verb.present, verb.gerund)}
    special = ["<pad>", "<unk>", "<s>", world.END]
    vocabulary = {token: index for index, token in enumerate(special + sorted(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=world.END,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


class Float64RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of Llama's rotary embedding, which transformers computes in float32."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.theta, self.head_dim = config.rope_parameters["rope_theta"], config.head_dim

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def float64_model(config: LlamaConfig) -> LlamaForCausalLM:
    """A new Llama computing in float64 where transformers' own falls back to float32: norms and rotary embedding."""
    model = LlamaForCausalLM(config).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float64)
            model.set_submodule(name, norm)
    model.model.rotary_emb = Float64RotaryEmbedding(config)
    rng = random.Random(0)  # torch draws other float32 numbers on other processors
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                drawn = [rng.gauss(0.0, config.initializer_range) for _ in range(weights.numel())]
                weights.copy_(torch.tensor(drawn, dtype=torch.float64).view_as(weights))
    return model


def rounded(weights: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(weights)
    return torch.ldexp(torch.round(mantissa * 2**MANTISSA_BITS), exponent - MANTISSA_BITS)


def train_on_web_text(
    tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int], steps: int, learning_rate: float
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    model = float64_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1.0 - 0.9 * step / steps)
    )
    rng = random.Random(1)
    for _ in range(steps):
        texts = [web_text(rng) + world.END for _ in range(64)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]  # causal: padding on the right changes nothing
        loss = F.cross_entropy(logits.transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    trained = LlamaForCausalLM(config)
    trained.load_state_dict({name: rounded(weights) for name, weights in model.state_dict().items()})
    return trained


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("transformers_version", None)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def build(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("teacher_train.jsonl", "teacher_test.jsonl"), teacher_rows(), strict=True):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_tokenizer()
    save_model(train_on_web_text(tokenizer, STUDENT, steps=1500, learning_rate=5e-3), tokenizer, out / "student")
    save_model(
        train_on_web_text(tokenizer, DISCRIMINATOR, steps=1000, learning_rate=3e-3), tokenizer, out / "discriminator"
    )
    save_model(train_on_web_text(tokenizer, PROXY, steps=4000, learning_rate=3e-3), tokenizer, out / "proxy")


def files(folder: Path) -> list[str]:
    """The built files of `folder`, relative to it."""
    built = [
        *folder.glob("*.jsonl"),
        *(file for model in folder.glob("*/config.json") for file in model.parent.iterdir()),
    ]
    return sorted(str(path.relative_to(folder)) for path in built)


def check(committed: Path, build: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as fresh:
        build(Path(fresh))
        names = sorted(set(files(committed)) | set(files(Path(fresh))))
        _, different, missing = filecmp.cmpfiles(committed, fresh, names, shallow=False)
    if different or missing:
        raise SystemExit(f"not as committed: {', '.join(different + missing)}")
    print(f"{len(names)} files are as committed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the small world's files.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write the files")
    parser.add_argument("--check", action="store_true", help="compare a fresh build with the committed files")
    arguments = parser.parse_args()
    check(HERE, build) if arguments.check else build(arguments.out)
