import importlib.util
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_bbkd.llkd.label_calibration import expected_calibration_error, reliability


TINYTOPICS = Path(__file__).parents[1] / "recipes" / "tinytopics"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"tinytopics_{name}", TINYTOPICS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world():
    return load_script("topics")


@pytest.fixture(scope="module")
def labelled(world):
    """Text, topic, the teacher's label and its confidence of fresh notes."""
    rng = random.Random(1)
    notes = (world.write_note(rng) for _ in range(20_000))
    return [(text, topic, *world.teacher_label(text, rng)) for text, topic in notes]


def read_rows(name):
    return [json.loads(line) for line in (TINYTOPICS / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def train_rows():
    return read_rows("teacher_train.jsonl")


@pytest.fixture(scope="module")
def held_out_rows():
    return read_rows("teacher_test.jsonl")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinytopics")
    load_script("build").build(folder)
    return folder


def test_every_file_is_what_build_makes(fresh):
    committed = {path.relative_to(TINYTOPICS) for path in [*TINYTOPICS.glob("*.jsonl"), *TINYTOPICS.glob("student/*")]}
    built = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    assert built == committed
    for name in built:
        if name.suffix == ".safetensors":
            weights, expected = load_file(fresh / name), load_file(TINYTOPICS / name)
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], expected[key]) for key in weights)
        elif name.name == "config.json":
            # It names the transformers that wrote it
            found, expected = (json.loads((folder / name).read_text()) for folder in (fresh, TINYTOPICS))
            assert found | {"transformers_version": ""} == expected | {"transformers_version": ""}
        else:
            assert (fresh / name).read_bytes() == (TINYTOPICS / name).read_bytes(), name


def test_the_files_are_small_and_hold_no_pickle():
    committed = [path for path in TINYTOPICS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in committed} <= {".py", ".jsonl", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in committed) <= 1_000_000


def test_every_word_belongs_to_one_list_and_has_a_probability_in_every_topic(world):
    assert len(set(world.VOCABULARY)) == len(world.VOCABULARY) == 200
    assert math.fsum(world.PRIOR.values()) == pytest.approx(1.0)
    for topic in world.TOPICS:
        words = world.word_probabilities(topic)
        assert tuple(words) == world.VOCABULARY and min(words.values()) > 0
        assert math.fsum(words.values()) == pytest.approx(1.0)


def test_notes_follow_their_topics_distribution(world, labelled):
    shares = Counter(topic for _, topic, _, _ in labelled)
    for topic, prior in world.PRIOR.items():
        assert shares[topic] / len(labelled) == pytest.approx(prior, abs=0.015)
        found = Counter(word for text, gold, _, _ in labelled if gold == topic for word in text.split())
        for word, probability in world.word_probabilities(topic).items():
            assert found[word] / found.total() == pytest.approx(probability, abs=0.005)


def test_the_posterior_is_bayes_rule_multiplied_out(world, held_out_rows):
    assert world.posterior([]) == pytest.approx(world.PRIOR)
    for row in held_out_rows[:50]:
        words = row["text"].split()
        joint = {t: p * math.prod(world.word_probabilities(t)[word] for word in words) for t, p in world.PRIOR.items()}
        expected = {topic: value / math.fsum(joint.values()) for topic, value in joint.items()}
        assert world.posterior(words) == pytest.approx(expected, rel=1e-9)


def test_the_teacher_is_as_often_right_as_it_says(labelled):
    confidence = torch.tensor([c for *_, c in labelled], dtype=torch.float64)
    is_correct = torch.tensor([label == topic for _, topic, label, _ in labelled])
    assert expected_calibration_error(confidence, is_correct) < 0.015
    bins = reliability(confidence, is_correct)
    filled = bins.count > 0
    errors = (bins.confidence * (1 - bins.confidence) / bins.count).sqrt()
    assert ((bins.accuracy - bins.confidence).abs() <= 4 * errors + 1e-9)[filled].all()


def test_the_teacher_is_careless_and_leans_to_the_most_frequent_topic(world, labelled):
    right = [label == topic for _, topic, label, _ in labelled]
    assert 0.70 < sum(right) / len(right) < 0.78
    wrong = [(label, confidence) for _, topic, label, confidence in labelled if label != topic]
    assert sum(label == "travel" for label, _ in wrong) / len(wrong) > 0.7
    assert sum(confidence < 0.6 for _, confidence in wrong) / len(wrong) > 0.7


def test_a_careful_reader_would_find_nearly_every_topic(world, held_out_rows):
    found = [max(p := world.posterior(row["text"].split()), key=p.get) for row in held_out_rows]
    right = sum(topic == row["label"] for topic, row in zip(found, held_out_rows, strict=True))
    assert 0.93 < right / len(held_out_rows) < 0.98


def test_rows_have_the_right_columns_and_test_rows_the_true_topic(world, train_rows, held_out_rows):
    assert len(train_rows) == 4000 and len(held_out_rows) == 1000
    assert len({row["text"] for row in [*train_rows, *held_out_rows]}) == 5000
    for row in train_rows:
        assert set(row) == {"text", "label", "teacher_confidence", "gold"}
        assert row["label"] in world.TOPICS and row["gold"] in world.TOPICS and 0 < row["teacher_confidence"] <= 1
    assert {row["label"] for row in train_rows} == set(world.TOPICS)
    assert 0.70 < sum(row["label"] == row["gold"] for row in train_rows) / 4000 < 0.78


def test_the_student_reads_every_note_and_takes_a_head(train_rows, held_out_rows):
    tokenizer = AutoTokenizer.from_pretrained(TINYTOPICS / "student")
    student = AutoModelForSequenceClassification.from_pretrained(TINYTOPICS / "student", num_labels=5)
    assert student.num_parameters() < 75_000
    texts = [row["text"] for row in [*train_rows, *held_out_rows]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:-1]) == text
        assert len(ids) <= student.config.max_position_embeddings
    inputs = tokenizer(texts[:8], padding=True, return_tensors="pt")
    assert student(**inputs).logits.shape == (8, 5)
