"""
Make every file of the small world: the teacher's answers, the base student and the base discriminator.

    python recipes/tinyworld/build.py [--out DIR]   write the files (default: beside this script)
    python recipes/tinyworld/build.py --check       build them again elsewhere and compare byte for byte

The two models are language models trained from scratch on loose text about the same world, so that they know its words
but answer no prompt correctly. They are trained in float64 and rounded to 12 bits of mantissa, so that processors which
add in another order still write the same bytes. Takes about three minutes on one core.
"""

import argparse
import filecmp
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).parent))
import world  # noqa: E402


HERE = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS, ANSWERED_TWICE = 4000, 256, 400
MAX_LENGTH = 64

STUDENT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DISCRIMINATOR = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


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
    """Loose talk about one person and one thing: words and turns of the teacher, careless about counts and form."""
    name, place, thing = rng.choice(world.NAMES), rng.choice(list(world.PLACES)), rng.choice(list(world.THINGS))
    pronoun = "he" if name in world.HE else "she"
    count = rng.randint(0, world.MAX_COUNT)
    many = " ".join(world.amount(count, thing))
    openings = (
        f"{name} goes to the {place} with {many} .",
        f"in the {place} {name} has {many} .",
        f"{name} keeps {many} .",
        f"{name} takes {many} to the {place} .",
    )
    sentences = [rng.choice(openings)]
    for _ in range(rng.randint(2, 4)):
        verb, k = rng.choice(world.PLACES[place]), rng.randint(0, 4)
        count += verb.sign * k
        if not 0 <= count <= world.MAX_COUNT or rng.random() < 0.3:
            count = rng.randint(0, world.MAX_COUNT)
        some, many = " ".join(world.amount(k, thing)), " ".join(world.amount(count, thing))
        sentences.append(
            rng.choice(
                (
                    f"{pronoun} {verb.present} {some} and so {pronoun} has {many} .",
                    f"in the end {pronoun} {verb.present} {k} , that makes {many} .",
                    f"now {name} {verb.present} {k} . then {pronoun} has {count} .",
                    f"after {verb.gerund} {some} , {name} has {many} .",
                    f"{verb.gerund} {k} makes {count} . {pronoun} goes home .",
                    f"{pronoun} {verb.present} {k} . so {pronoun} has {count} .",
                    f"then {pronoun} {verb.present} {k} and has {count} .",
                )
            )
        )
    return " ".join(sentences)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; a text gets no special token, so a prompt's tokens begin those of prompt and answer."""
    words = (
        set(world.NAMES)
        | set(world.PLACES)
        | set("a to the he she has now that makes so goes home with in end".split())
    )
    words |= set("keeps takes after then and , .".split()) | {str(n) for n in range(world.MAX_COUNT + 1)}
    words |= set(world.THINGS) | set(world.THINGS.values())
    words |= {form for verbs in world.PLACES.values() for verb in verbs for form in (verb.present, verb.gerund)}
    words -= {"a"}
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


def train_on_web_text(
    tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int], steps: int, learning_rate: float
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
        **sizes,
    )
    model = LlamaForCausalLM(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1.0 - 0.9 * step / steps)
    )
    rng = random.Random(1)
    for _ in range(steps):
        texts = [web_text(rng) + world.END for _ in range(64)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for parameter in model.parameters():
            mantissa, exponent = torch.frexp(parameter)
            parameter.copy_(torch.ldexp(torch.round(mantissa * 2**12), exponent - 12))
    return model.float()


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
    save_model(train_on_web_text(tokenizer, STUDENT, steps=1200, learning_rate=5e-3), tokenizer, out / "student")
    save_model(
        train_on_web_text(tokenizer, DISCRIMINATOR, steps=600, learning_rate=3e-3), tokenizer, out / "discriminator"
    )


def files(folder: Path) -> list[str]:
    """The built files of `folder`, relative to it."""
    built = [*folder.glob("*.jsonl"), *folder.glob("student/*"), *folder.glob("discriminator/*")]
    return sorted(str(path.relative_to(folder)) for path in built)


def check() -> None:
    with tempfile.TemporaryDirectory() as fresh:
        build(Path(fresh))
        names = sorted(set(files(HERE)) | set(files(Path(fresh))))
        _, different, missing = filecmp.cmpfiles(HERE, fresh, names, shallow=False)
    if different or missing:
        raise SystemExit(f"not as committed: {', '.join(different + missing)}")
    print(f"{len(names)} files are as committed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the small world's files.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write the files")
    parser.add_argument("--check", action="store_true", help="compare a fresh build with the committed files")
    arguments = parser.parse_args()
    check() if arguments.check else build(arguments.out)
