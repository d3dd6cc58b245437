import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_bbkd.data.teacher_data import prompt_token_ids, tokenize_teacher_data
from trl_bbkd.evaluation.student import (
    evaluate_student,
    evaluate_teacher,
    generate_completion_ids,
    generate_completions,
    judge,
    teacher_nll,
)


@pytest.fixture
def student(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def rows(standard_rows, tokenizer):
    rows = [{**row, "prompt": f"{number} {row['prompt']}"} for number, row in enumerate(standard_rows[:6])]
    return tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=40)[0].to_list()


@pytest.fixture(scope="module")
def prompts(rows):
    return [row["prompt"] for row in rows[:4]]


def greedy_by_hand(model, prompt_ids, steps):
    ids = torch.tensor([prompt_ids])
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt_ids) :].tolist()


class TestGeneration:
    @pytest.mark.parametrize("batch_size", [1, 3, 32])
    def test_greedy_is_the_argmax_whatever_the_batch(self, student, tokenizer, prompts, batch_size):
        completions = generate_completion_ids(
            student, tokenizer, prompts, max_new_tokens=6, temperature=0.0, num_samples=5, batch_size=batch_size
        )
        expected = [[greedy_by_hand(student, tokenizer(prompt)["input_ids"], 6)] for prompt in prompts]
        assert completions == expected

    def test_chat_prompts_are_continued_after_the_generation_prompt(self, student, tokenizer):
        chat = [[{"role": "user", "content": "Say hello to the cat."}]]
        rendered = [tokenizer.apply_chat_template(chat[0], add_generation_prompt=True, tokenize=False)]
        both = [
            generate_completions(student, tokenizer, prompts, max_new_tokens=6, temperature=0.0)
            for prompts in (chat, rendered)
        ]
        assert both[0] == both[1]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_stops_at_any_end_token_and_keeps_it(self, student, tokenizer, prompts, temperature):
        student.generation_config.eos_token_id = list(range(3, 200))
        samples = generate_completion_ids(
            student, tokenizer, prompts, max_new_tokens=30, temperature=temperature, num_samples=3
        )
        ends = {*range(3, 200), tokenizer.eos_token_id}
        finished = [ids for group in samples for ids in group if len(ids) < 30]
        assert finished
        for ids in finished:
            assert ids[-1] in ends and not ends.intersection(ids[:-1])

    def test_sampling_is_repeatable_and_leaves_no_trace(self, student, tokenizer, prompts):
        student.train()
        torch.manual_seed(7)
        state = torch.get_rng_state()
        settings = {"max_new_tokens": 8, "num_samples": 3}
        first = generate_completions(student, tokenizer, prompts, **settings, seed=1)
        assert torch.equal(torch.get_rng_state(), state) and student.training
        torch.manual_seed(8)
        assert generate_completions(student, tokenizer, prompts, **settings, seed=1) == first
        assert generate_completions(student, tokenizer, prompts, **settings, seed=2) != first
        assert [len(group) for group in first] == [3] * len(prompts)

    def test_checkpoint_sampling_settings_do_not_leak_in(self, student, tokenizer, prompts):
        settings = {"max_new_tokens": 8, "num_samples": 4}
        plain = generate_completions(student, tokenizer, prompts, **settings)
        student.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0, top_p=0.1)
        assert generate_completions(student, tokenizer, prompts, **settings) == plain

    def test_nucleus_of_nothing_is_greedy(self, student, tokenizer, prompts):
        narrow = generate_completions(student, tokenizer, prompts, max_new_tokens=6, top_p=1e-6)
        assert narrow == generate_completions(student, tokenizer, prompts, max_new_tokens=6, temperature=0.0)


class TestTeacherNLL:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_is_the_mean_over_answer_tokens(self, student, tokenizer, rows, batch_size):
        total, tokens = 0.0, 0
        with torch.no_grad():
            for row in rows:
                prompt = tokenizer(row["prompt"])["input_ids"]
                log_probs = student(input_ids=torch.tensor([prompt + row["teacher_ids"]])).logits[0].log_softmax(-1)
                for position, token in enumerate(row["teacher_ids"], start=len(prompt)):
                    total -= log_probs[position - 1, token].item()
                    tokens += 1
        assert teacher_nll(student, tokenizer, rows, batch_size=batch_size) == pytest.approx(total / tokens, rel=1e-5)

    def test_end_token_counts(self, student, tokenizer, rows):
        assert rows[0]["teacher_ids"][-1] == tokenizer.eos_token_id
        without_end = [{**row, "teacher_ids": row["teacher_ids"][:-1]} for row in rows[:1]]
        assert teacher_nll(student, tokenizer, rows[:1]) != teacher_nll(student, tokenizer, without_end)


def has_a_vowel(prompts, completions):
    assert len(prompts) == len(completions) and isinstance(prompts[0], str)
    return {
        "valid": [float(any(vowel in text for vowel in "aeiou")) for text in completions],
        "characters": [len(text) for text in completions],
    }


class TestEvaluateStudent:
    def test_with_a_judge(self, student, tokenizer, rows):
        metrics = evaluate_student(student, tokenizer, rows, has_a_vowel, max_new_tokens=5, num_samples=3, seed=3)
        prompts = [row["prompt"] for row in rows]
        groups = generate_completions(student, tokenizer, prompts, max_new_tokens=5, num_samples=3, seed=3)
        pairs = [(prompt, text) for prompt, group in zip(prompts, groups, strict=True) for text in group]
        valid = has_a_vowel(*zip(*pairs, strict=True))["valid"]
        assert metrics["valid@t1.0"] == pytest.approx(sum(valid) / len(valid))
        distinct = {pair for pair, value in zip(pairs, valid, strict=True) if value == 1}
        assert metrics["distinct_valid@t1.0"] == len(distinct)
        assert metrics["teacher_nll"] == pytest.approx(teacher_nll(student, tokenizer, rows))
        for at in ("t1.0", "t0.7", "greedy"):
            assert {f"{name}@{at}" for name in ("valid", "characters", "length", "length_ratio", "truncated")} <= set(
                metrics
            )
        teacher_length = sum(len(row["teacher_ids"]) for row in rows) / len(rows)
        assert metrics["length_ratio@greedy"] == pytest.approx(metrics["length@greedy"] / teacher_length)
        assert all(math.isfinite(value) for value in metrics.values())

    def test_without_a_judge(self, student, tokenizer, rows):
        metrics = evaluate_student(
            student, tokenizer, rows, max_new_tokens=1, num_samples=50, temperatures=(1.0, 0.0), batch_size=64
        )
        assert 0 < metrics["distinct_share@t1.0"] < 1
        assert not any(name.startswith(("valid", "distinct_valid")) or "t0.7" in name for name in metrics)
        assert metrics["truncated@greedy"] == 1.0 and metrics["length@greedy"] == 1.0

    def test_judge_without_names(self):
        with pytest.raises(ValueError, match="must return a dict of lists, one for each metric by its name; got list"):
            judge(lambda prompts, texts: [1.0], ["a"], ["b"])

    def test_judge_that_returns_too_little(self, student, tokenizer, rows):
        with pytest.raises(ValueError, match="one number for each of the 6 completions; .*'valid': 1"):
            evaluate_student(
                student, tokenizer, rows, lambda p, c: {"valid": [1.0]}, max_new_tokens=2, temperatures=(0.0,)
            )

    def test_teacher_is_judged_alike(self, rows):
        metrics = evaluate_teacher(rows, has_a_vowel)
        assert metrics["valid@t1.0"] == 1.0 and metrics["length_ratio@t1.0"] == 1.0
        assert metrics["characters@t1.0"] == sum(len(row["completion"]) for row in rows) / len(rows)

    def test_a_prompt_with_several_answers_is_sampled_once(self, student, tokenizer, rows):
        """Its samples weigh as one prompt's, its answers' lengths as their mean; the NLL is that of all answers."""
        several = [*rows, {**rows[0], "completion": " b", "teacher_ids": [*rows[0]["teacher_ids"][:2], 2]}]
        settings = {"max_new_tokens": 5, "num_samples": 3, "seed": 3}
        by_row: dict[str, list[float]] = {}
        once = evaluate_student(student, tokenizer, rows, has_a_vowel, **settings)
        found = evaluate_student(student, tokenizer, several, has_a_vowel, by_row=by_row, **settings)
        assert found["valid@t1.0"] == once["valid@t1.0"] and found["length@t0.7"] == once["length@t0.7"]
        assert found["teacher_nll"] == pytest.approx(teacher_nll(student, tokenizer, several))
        assert found["teacher_nll"] != pytest.approx(once["teacher_nll"])
        assert {name: len(values) for name, values in by_row.items()} == {
            name: 7 if name == "teacher_nll" else 6 for name in by_row
        }
        lengths = [len(row["teacher_ids"]) for row in rows]
        mean = (sum(lengths) - lengths[0] + (lengths[0] + 3) / 2) / 6
        assert found["length_ratio@greedy"] == pytest.approx(found["length@greedy"] / mean)
        teacher = evaluate_teacher(several, has_a_vowel)
        assert teacher["length@t1.0"] == pytest.approx(mean)
        assert teacher["valid@t1.0"] == pytest.approx((5 + 0.5) / 6)

    def test_conversational_rows(self, student, tokenizer, conversational_rows):
        data, _ = tokenize_teacher_data(
            Dataset.from_list(conversational_rows[:3]), tokenizer, max_completion_length=16
        )
        rows = data.to_list()
        assert prompt_token_ids(tokenizer, [row["prompt"] for row in rows])[0][0] == tokenizer.convert_tokens_to_ids(
            "<|im_start|>"
        )
        metrics = evaluate_student(student, tokenizer, rows, max_new_tokens=3, num_samples=2)
        assert metrics["teacher_nll"] > 0 and "length@t0.7" in metrics
