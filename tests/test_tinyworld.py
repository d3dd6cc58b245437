import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


TINYWORLD = Path(__file__).parents[1] / "recipes" / "tinyworld"
PROMPT = "tom takes 4 pears to the market ."
ANSWER = "he buys 2 . now he has 6 pears . after selling 3 , he has 3 . tom goes home with 3 pears ."


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"tinyworld_{name}", TINYWORLD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world():
    return load_script("world")


def read_rows(name):
    return [json.loads(line) for line in (TINYWORLD / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def train_rows():
    return read_rows("teacher_train.jsonl")


@pytest.fixture(scope="module")
def held_out_rows():
    return read_rows("teacher_test.jsonl")


def test_the_teacher_is_always_valid_and_rarely_repeats_itself(world):
    rng = random.Random(0)
    prompts = [world.make_prompt(rng) for _ in range(200)]
    answers = [world.sample_answer(prompt, rng) for prompt in prompts]
    assert world.judge(prompts, answers) == {"valid": [1.0] * 200}
    assert len({world.sample_answer(PROMPT, rng) for _ in range(200)}) > 190


@pytest.mark.parametrize(
    "wrong",
    [
        ANSWER.replace("has 6", "has 5"),
        ANSWER.replace("has 3 .", "has 2 ."),
        ANSWER.replace("with 3", "with 6"),
        ANSWER.replace("tom", "sam"),
        ANSWER.replace("after selling 3 , he", "after selling 3 , she"),
        ANSWER.replace("pears", "figs"),
        ANSWER.replace("6 pears", "6 pear"),
        ANSWER.replace("selling", "losing"),  # a verb of the forest
        ANSWER.replace("after selling 3 , he has 3", "after buying 3 , he has 9"),  # a verb told twice
        ANSWER.replace("buys 2", "buys 6").replace("has 6", "has 10"),
        ANSWER.removesuffix(" ."),
        ANSWER.removesuffix(" tom goes home with 3 pears ."),
        ANSWER + " tom keeps 3 pears .",
        ANSWER.replace("home", "house"),
        "",
    ],
)
def test_a_wrong_answer_is_invalid(world, wrong):
    assert wrong != ANSWER
    assert world.judge([PROMPT, PROMPT], [ANSWER, wrong]) == {"valid": [1.0, 0.0]}


def test_valid_is_what_the_distribution_lets_end(world, held_out_rows):
    """Of answers, and of answers with a word lost, doubled or taken from another one."""
    rng, verdicts = random.Random(0), set()
    for row, other in zip(held_out_rows[:60], held_out_rows[60:], strict=False):
        words = row["completion"].split()
        at = rng.randrange(len(words))
        stranger = rng.choice(other["completion"].split())
        for answer in (
            words,
            words[:at],
            words[:at] + words[at + 1 :],
            words[: at + 1] + words[at:],
            [*words[:at], stranger],
        ):
            for end in ([], words[at + 1 :], [world.END]):
                text = [*answer, *end]
                expected = world.END in world.next_token_distribution(row["prompt"], text)
                assert world.is_valid(row["prompt"], " ".join(text)) == expected, text
                verdicts.add(expected)
    assert verdicts == {True, False}


def test_another_prompt_makes_the_answer_wrong(world):
    for other in (PROMPT.replace("4", "5"), PROMPT.replace("tom", "ben"), PROMPT.replace("market", "river")):
        assert not world.is_valid(other, ANSWER)


def test_a_foreign_prompt_is_refused(world):
    for prompt in ("", "tom takes 4 pear to the market .", "tell me about pears ."):
        with pytest.raises(ValueError, match="not a prompt of this world"):
            world.is_valid(prompt, ANSWER)


def test_distributions_sum_to_one_and_are_empty_off_the_path(world, held_out_rows):
    for row in held_out_rows[:20]:
        tokens = [*row["completion"].split(), world.END]
        for length, token in enumerate(tokens):
            distribution = world.next_token_distribution(row["prompt"], tokens[:length])
            assert sum(distribution.values()) == pytest.approx(1.0)
            assert min(distribution.values()) > 0 and token in distribution
        assert world.next_token_distribution(row["prompt"], tokens) == {}
        assert world.next_token_distribution(row["prompt"], ["pears"]) == {}


def test_samples_follow_the_next_token_distribution(world):
    rng = random.Random(0)
    first_words = [world.sample_answer(PROMPT, rng).split()[0] for _ in range(2000)]
    expected = world.next_token_distribution(PROMPT, [])
    assert set(expected) == {"he", "after", "then"}
    for word, probability in expected.items():
        assert first_words.count(word) / 2000 == pytest.approx(probability, abs=0.05)


def test_committed_text_is_what_the_world_writes(train_rows, held_out_rows):
    assert load_script("build").teacher_rows() == (train_rows, held_out_rows)


def test_committed_text_is_valid_and_test_prompts_are_new(world, train_rows, held_out_rows):
    for rows in (train_rows, held_out_rows):
        judged = world.judge([row["prompt"] for row in rows], [row["completion"] for row in rows])
        assert sum(judged["valid"]) == len(rows)
    train_prompts = {row["prompt"] for row in train_rows}
    assert not train_prompts & {row["prompt"] for row in held_out_rows}
    assert len({row["prompt"] for row in held_out_rows}) == len(held_out_rows) == 256
    assert len(train_prompts) < len(train_rows)  # some prompts are answered twice


@pytest.mark.parametrize("model", ["student", "discriminator", "proxy"])
def test_the_tokenizer_keeps_the_text_and_a_prompt_begins_its_conversation(model, train_rows):
    tokenizer = AutoTokenizer.from_pretrained(TINYWORLD / model)
    for row in train_rows[:200]:
        prompt, text = row["prompt"], row["prompt"] + row["completion"]
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) - len(prompt_ids) <= 28


def test_the_base_student_samples_the_worlds_words_but_hardly_a_valid_answer(world, held_out_rows):
    tokenizer = AutoTokenizer.from_pretrained(TINYWORLD / "student", padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(TINYWORLD / "student")
    assert student.num_parameters() <= 1_000_000
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id
    assert student.generation_config.pad_token_id == tokenizer.pad_token_id
    prompts = [row["prompt"] for row in held_out_rows[:64]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    generated = student.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=32)
    generated = generated[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert sum(world.judge(prompts, answers)["valid"]) <= 3
    assert all(prompt.split()[0] in answer or " he " in f" {answer} " or " she " in f" {answer} "
               for prompt, answer in zip(prompts, answers, strict=True))  # fmt: skip


def test_the_committed_files_are_small_and_hold_no_pickle(world):
    committed = [path for path in TINYWORLD.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in committed) <= 3_000_000
    assert {path.suffix for path in committed} <= {".py", ".jsonl", ".json", ".safetensors"}


@pytest.mark.slow
def test_every_file_is_rebuilt_byte_for_byte():
    result = subprocess.run([sys.executable, TINYWORLD / "build.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "files are as committed" in result.stdout
