"""
Make every file of the small world of topics: the teacher's labels, the test rows and the base student.

    python recipes/tinytopics/build.py [--out DIR]   write the files (default: beside this script)

The student is a tiny BERT without a head and with random weights: it has never seen a note. Takes a few seconds.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).parent))
import topics  # noqa: E402


HERE = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS = 4000, 1000
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
MAX_LENGTH = 16  # the longest note, [CLS] and [SEP]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def teacher_rows() -> tuple[list[dict], list[dict]]:
    """Training rows with the teacher's labels, and test rows with the true ones; no note is there twice."""
    rng = random.Random(0)
    notes: dict[str, str] = {}
    while len(notes) < TRAIN_ROWS + TEST_ROWS:
        text, topic = topics.write_note(rng)
        notes.setdefault(text, topic)
    train = []
    for text, topic in list(notes.items())[:TRAIN_ROWS]:
        label, confidence = topics.teacher_label(text, rng)
        train.append({"text": text, "label": label, "teacher_confidence": round(confidence, 4), "gold": topic})
    return train, [{"text": text, "label": topic} for text, topic in list(notes.items())[TRAIN_ROWS:]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), *topics.VOCABULARY])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False, **SPECIAL
    )


def build_student(tokenizer: PreTrainedTokenizerFast) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        **SIZES,
    )
    model = BertModel(config)
    rng = random.Random(0)  # torch draws other numbers on other processors
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                drawn = [rng.gauss(0.0, config.initializer_range) for _ in range(weights.numel())]
                weights.copy_(torch.tensor(drawn).view_as(weights))
    return model


def write_rows(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    train, test = teacher_rows()
    write_rows(train, out / "teacher_train.jsonl")
    write_rows(test, out / "teacher_test.jsonl")
    tokenizer = build_tokenizer()
    build_student(tokenizer).save_pretrained(out / "student")
    tokenizer.save_pretrained(out / "student")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the files of the small world of topics.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write the files")
    build(parser.parse_args().out)
