"""Labels from an endpoint to a student of LLKD, with no code between."""

import json
import math

import pytest
import yaml
from datasets import load_dataset
from transformers import BertModel

from tests.collect.helpers import left_out, run
from tests.collect.server import TeacherServer
from tests.conftest import build_tokenizer
from tests.llkd.helpers import NAMES, ON_CPU, build_encoder
from trl_bbkd.collect.labels import Labeller
from trl_bbkd.collect.replies import read_choice
from trl_bbkd.collect.settings import CollectConfig
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run as train


LETTERS = dict(zip(NAMES, "ABC", strict=True))
TEXTS = [{"text": f"{NAMES[n % 3]} note {n}", "label": NAMES[n % 3], "source": "notes"} for n in range(24)]
BY_LOGPROBS = {"labels": NAMES, "logprobs": True, "top_logprobs": 5}


class LabelServer(TeacherServer):
    """A teacher that knows the label from a text's first word, and is sure of it to 0.8; `says` has its words."""

    says = "{letter}"

    def _choice(self, body, index, fault):
        choice = super()._choice(body, index, fault)
        name = body["messages"][-1]["content"].split()[0]
        seed = (body.get("seed") or 0) + index
        if "note 3\n" in body["messages"][-1]["content"] and seed % 5 in (1, 2):
            name = NAMES[(NAMES.index(name) + seed) % 3] if seed % 5 == 1 else "?"
        text = self.says.format(letter=LETTERS.get(name, "Z"), name=name)
        choice["message"]["content"] = text
        if choice["logprobs"] is not None:
            others = [letter for letter in "ABC" if letter != LETTERS[name]]
            listed = [
                (text, 0.8),
                (f" {others[0]}", 0.1),
                (others[1].lower(), 0.03),
                (f"{others[1]}.", 0.05),
                ("The", 0.01),
            ]
            entries = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in listed]
            choice["logprobs"] = {"content": [entries[0] | {"top_logprobs": entries}]}
        return choice


def collected(tmp_path, texts=TEXTS, says="{letter}", **changes):
    with LabelServer() as server:
        server.says = says
        found = run(server, tmp_path, texts, **changes)
        return found, server


def test_log_probabilities_of_letters(tmp_path):
    found, server = collected(tmp_path, **BY_LOGPROBS)
    assert server.asked[0]["messages"][-1]["content"] == (
        "sky note 0\n\nWhich of these labels does the text have?\nA. sky\nB. fruit\nC. animal\n\nAnswer with the letter alone."
    )
    for row, source in zip(found, TEXTS, strict=True):
        number = NAMES.index(source["label"])
        assert (row["text"], row["label"], row["gold"]) == (source["text"], number, source["label"])
        assert row["teacher_confidence"] == row["teacher_probs"][number] == pytest.approx(0.8 / 0.95)
        assert sorted(row["teacher_probs"]) == pytest.approx([0.05 / 0.95, 0.1 / 0.95, 0.8 / 0.95])
        assert row["source"] == "notes" and "prompt" not in row and "completion" not in row
    rows = load_dataset("parquet", data_files=str(tmp_path / "out/train.parquet"), split="train")
    assert rows.features["label"].names == NAMES
    card = (tmp_path / "out/README.md").read_text()
    assert "24 texts with the teacher's label, one a row" in card and "| label sky | 8 |" in card


def test_votes(tmp_path):
    """An answer that is no label speaks for none of them, and a text without any is left out."""
    found, server = collected(tmp_path, labels=NAMES, num_samples=5, temperature=1.0)
    sure, unsure = found[0], found[3]
    assert sure["teacher_probs"] == [1.0, 0.0, 0.0] and server.requests == 25
    assert unsure["label"] == 0 and unsure["teacher_probs"] == pytest.approx(
        [(3 + 1 / 3) / 5, (1 + 1 / 3) / 5, (1 / 3) / 5]
    )
    assert [(line["row"], line["sample"], line["left_out"]) for line in left_out(tmp_path)] == [(3, 2, "no label")]
    found, _ = collected(tmp_path, says="none of them", labels=NAMES, num_samples=2)
    assert found != []  # the set of an earlier recipe stays until there is another


def test_names_and_a_prompt_of_ones_own(tmp_path):
    changes = dict(
        labels=NAMES,
        label_answers="names",
        num_samples=2,
        label_prompt="{text} | {labels}?",
        system_prompt="Be brief.",
    )
    found, server = collected(tmp_path, says="**{name}**.", **changes)
    assert [row["label"] for row in found] == [n % 3 for n in range(24)]
    assert server.asked[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "sky note 0 | sky, fruit, animal?"},
    ]


def test_what_a_teacher_says_of_its_label(tmp_path):
    found, server = collected(tmp_path, says="{letter}\nConfidence: 70", labels=NAMES, teacher_confidence="verbalised")
    assert found[0]["teacher_probs"] == pytest.approx([0.7, 0.15, 0.15]) and found[0]["teacher_confidence"] == 0.7
    assert "how sure you are" in server.asked[0]["messages"][0]["content"]
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError):
        collected(tmp_path / "b", says="{letter}", labels=NAMES, teacher_confidence="verbalised")
    assert {line["left_out"] for line in left_out(tmp_path / "b")} == {"no confidence"}


def test_a_column_of_another_name_and_gold(tmp_path):
    texts = [{"note": row["text"], "gold": row["label"], "text": "another"} for row in TEXTS]
    found, _ = collected(tmp_path, texts, prompt_column="note", **BY_LOGPROBS)
    assert [row["text"] for row in found] == [row["text"] for row in TEXTS]
    assert [row["gold"] for row in found] == [row["label"] for row in TEXTS] and "note" not in found[0]


def labeller(**changes):
    return Labeller(CollectConfig("http://x", "m", "out", "x", **changes))


def whole(content, logprobs=None):
    return read_choice({"message": {"content": content}, "logprobs": logprobs, "finish_reason": "stop"})


def read(content, listed, first=0):
    """What one answer says, whose one token has these alternatives, or those from another place on."""
    entries = [{"token": token, "logprob": math.log(p) if p else -9999.0, "bytes": None} for token, p in listed]
    logprobs = {"content": [entries[0] | {"top_logprobs": entries[first:]}]}
    return labeller(**BY_LOGPROBS).read([whole(content, logprobs)])


def test_of_log_probabilities_the_likeliest_letter_is_the_label():
    """Also where another one was drawn, and by all the ways in which a letter is written."""
    found = read("A", [("A", 0.3), ("B", 0.2), (" B", 0.2), ("B.", 0.1), ("b", 0.1), ("Because", 0.05)])
    assert found.label == 1 and found.probs == pytest.approx([0.375, 0.625, 0.0])


def test_a_letter_that_is_not_among_its_alternatives_counts():
    assert read("B", [("B", 0.5), ("A", 0.25)], first=1).probs == pytest.approx([1 / 3, 2 / 3, 0.0])


def test_answers_without_a_label_are_none():
    votes = labeller(labels=NAMES, num_samples=2)
    assert votes.read([whole("I cannot say."), whole("?")]) is None and votes.read([]) is None


def test_a_letter_comes_before_a_name():
    assert labeller(labels=["b", "a"], num_samples=2).label(whole("A")) == 0
    by_letter = labeller(labels=NAMES, num_samples=2)
    assert [by_letter.label(whole(text)) for text in ("B", "b. fruit", "Fruit")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("content", "listed"),
    [
        ("fruit", [("fruit", 0.9), ("B", 0.05)]),  # a name where letters are read
        ("I think B", [("I think B", 0.9)]),
        ("B", [("C", 0.9), ("B", 0.05)]),  # another token than the answer's
        ("B", [("B", 0.9), ("A", 0.9)]),  # no natural logarithms
        ("B", [("B", 0.0)]),  # no number at all
    ],
)
def test_of_what_is_not_proven_nothing_is_read(content, listed):
    assert read(content, listed) is None


def test_from_the_endpoint_to_a_student(tmp_path):
    """The recipe names the folder, and nothing else of it."""
    collected(tmp_path, [row | {"text": f"{row['text']} again {n}"} for n in range(2) for row in TEXTS], **BY_LOGPROBS)
    encoder = BertModel(build_encoder().config)
    encoder.save_pretrained(tmp_path / "student")
    build_tokenizer().save_pretrained(tmp_path / "student")
    values = {"method": "llkd", "model_name_or_path": str(tmp_path / "student"), "dataset_name": str(tmp_path / "out")}
    values |= {"teacher_name": "a test", "output_dir": str(tmp_path / "llkd"), "bf16": False, "max_steps": 4}
    values |= {**ON_CPU, "save_strategy": "no", "baselines": False, "selection_warmup_steps": 2}
    (tmp_path / "llkd.yaml").write_text(yaml.safe_dump(values))
    train(load_recipe(tmp_path / "llkd.yaml"))
    metrics = json.loads((tmp_path / "llkd/metrics.json").read_text())
    assert metrics["results"]["LLKD"]["accuracy"] >= 0
    report = (tmp_path / "llkd/report.md").read_text()
    assert "| mean confidence | 0.842 |" in report and "label sky" in report
