"""A judge at the evaluations of a trainer of TRL: what it says by hand, the best checkpoint by it, a judge that fails."""

import asyncio
import json
import logging

import numpy as np
import pytest
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.collect.server import KEY, MODEL
from tests.conftest import SENTENCES
from tests.judging.helpers import JudgeServer, judging
from tests.processes import on_processes
from trl_bbkd import EvalJudgeConfig, JudgeCallback
from trl_bbkd.errors import EndpointError, RecipeError, TeacherDataError


ROWS = [{"prompt": f"{n} {SENTENCES[2 * n % 8]}", "completion": f" t{n}"} for n in range(8)]
# Of each step, the prompts on which the student wins, and those on which the judge sees no difference
WINS = {1: ({0}, {1}), 2: ({0, 1, 2, 3, 4}, {5}), 3: ({0, 1, 2}, set())}
OF_THE_CHECK = 4  # requests about the teacher's own answers
OF_A_STEP = 7 * 2


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def by_wins(is_points, request, first, second):
    student = next((text for text in (first, second) if text.startswith("s")), None)
    if student is None:
        return "The same twice.\nVerdict: tie"
    step, prompt = map(int, student.removeprefix("s").split())
    wins, ties = WINS[step]
    if prompt in ties:
        return "Verdict: tie"
    return f"Verdict: {'A' if (first == student) == (prompt in wins) else 'B'}"


class WrittenAnswers(JudgeCallback):
    """The student says which step it is."""

    def _answers(self, args, model):
        step = self.trainer.state.global_step
        return {key: [f"s{step} {number}"] for number, key in enumerate(self.judge.prompts)}


class Tracker(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs += [(state.global_step, dict(logs))]


def make_trainer(output, model, **changes):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    args = SFTConfig(str(output), **settings | changes)
    rows = Dataset.from_list(ROWS)
    return SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows.select(range(2)))


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_win_rate"}


def judged_training(server, output, model, callback=WrittenAnswers, judge=None, rows=ROWS, **changes):
    trainer = make_trainer(output, model, **changes)
    settings = {"base_url": server.url, "model": MODEL, "metrics": ["win_rate"], "max_prompts": 7} | (judge or {})
    trainer.add_callback(callback(trainer, rows, EvalJudgeConfig(**settings)))
    tracker = Tracker()
    trainer.add_callback(tracker)
    return trainer, tracker


def test_the_best_checkpoint_is_the_judges(tmp_path, tiny_model_dir, capsys):
    """Win rates by hand, in the log, for trackers and as the metric of the best model; and a second run is free."""
    with judging(by_wins) as server:
        trainer, tracker = judged_training(server, tmp_path / "out", tiny_model_dir, **BEST)
        trainer.train()
        asked = server.requests
        assert asked == OF_THE_CHECK + 3 * OF_A_STEP
        again, _ = judged_training(server, tmp_path / "out", tiny_model_dir, **BEST)
        again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
        assert server.requests == asked
    assert f"14 requests to {MODEL} at each of 3 evaluations, for 7 prompts, without a cap." in capsys.readouterr().out
    expected = {step: (len(wins) + len(ties) / 2) / 7 for step, (wins, ties) in WINS.items()}
    for logs in (trainer.state.log_history, again.state.log_history):
        found = {line["step"]: line for line in logs if "eval_win_rate" in line}
        assert {step: line["eval_win_rate"] for step, line in found.items()} == pytest.approx(expected)
        assert all(
            line["eval_win_rate_low"] < line["eval_win_rate"] < line["eval_win_rate_high"] for line in found.values()
        )
    tracked = {step: logs["eval_win_rate"] for step, logs in tracker.logs if "eval_win_rate" in logs}
    assert tracked == pytest.approx(expected) and not any(
        "eval_loss" in log and "eval_win_rate" in log for _, log in tracker.logs
    )
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == pytest.approx(expected[2])
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert np.argmin(losses) != 1, "the loss chooses another one"
    lines = [json.loads(line) for line in (tmp_path / "out/judge/step-2.jsonl").read_text().splitlines()]
    assert len(lines) == OF_A_STEP and lines[0]["answer"] == "s2 0" and "Verdict: A" in lines[0]["judge"]


def test_a_training_is_the_same_with_a_judge(tmp_path, tiny_model_dir):
    """The student writes its own answers, at a temperature."""
    told = []

    def says(is_points, request, first, second):
        told.append((request, first, second))
        return "Points: A 6, B 2" if is_points else "Verdict: A"

    judge = {"metrics": ["win_rate", "score"], "student_temperature": 1.0, "student_max_tokens": 5, "max_prompts": 3}
    with judging(says) as server:
        trainer, _ = judged_training(server, tmp_path / "out", tiny_model_dir, JudgeCallback, judge, max_steps=2)
        trainer.train()
        # Some answers are the same as in the step before
        assert (
            2 * 3 + 2 * 2 * 3
            < server.requests
            == len({json.dumps(body) for body in server.asked})
            <= 2 * 3 + 2 * 2 * 2 * 3
        )
    plain = make_trainer(tmp_path / "plain", tiny_model_dir, max_steps=2)
    plain.train()
    for name, value in plain.model.state_dict().items():
        assert value.equal(trainer.model.state_dict()[name]), name
    # Both orders make of 6 and 2 points as much as of a judge that likes the first place
    (last,) = (line for line in trainer.state.log_history if line["step"] == 2 and "eval_score" in line)
    assert (last["eval_score"], last["eval_win_rate"], last["eval_judge_missing"]) == (0.5, 0.5, 0)
    assert "eval_score_low" not in last
    prompts = {row["prompt"] for row in ROWS[:3]}
    students = {text for request, *both in told for text in both} - {row["completion"] for row in ROWS[:3]}
    assert {request for request, *_ in told} == prompts and len(students) > 3


def test_a_metric_of_the_same_name_is_refused(tmp_path, tiny_model_dir):
    """Of the trainer's own, before the judge is asked and it is lost."""
    with judging(by_wins) as server:
        trainer, _ = judged_training(server, tmp_path / "out", tiny_model_dir)
        trainer.compute_metrics = lambda _: {"win_rate": 0.5}
        with pytest.raises(RecipeError, match="both would be eval_win_rate. Rename"):
            trainer.evaluate()
        assert server.requests == OF_THE_CHECK


class FailingServer(JudgeServer):
    """After so many requests it refuses the key."""

    async def _answer(self, writer, path, raw, key):
        return await super()._answer(writer, path, raw, key if self.requests < self.ends_after else "another")


def test_a_judge_that_fails_ends_no_training(tmp_path, tiny_model_dir, caplog):
    """Neither does a cap. The step is not the best, and a later run asks for what is missing."""
    server = FailingServer()
    server.says, server.ends_after = by_wins, OF_THE_CHECK + OF_A_STEP + 3
    with server, caplog.at_level(logging.WARNING):
        trainer, _ = judged_training(server, tmp_path / "out", tiny_model_dir, **BEST)
        trainer.train()
        warnings = [record.message for record in caplog.records if "is not judged" in record.message]
        assert [line.partition(" is")[0] for line in warnings] == ["Step 2", "Step 3"] and KEY not in caplog.text
        assert "status 401" in warnings[0] and "The same command" not in warnings[0]
        assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1
        assert [line["step"] for line in trainer.state.log_history if "eval_win_rate" in line] == [1]
        asked, server.ends_after = server.requests, 10_000
        judge = {"max_requests": asked + 5}
        capped, _ = judged_training(server, tmp_path / "out", tiny_model_dir, judge=judge, **BEST)
        capped.train()
        *_, last = (line for line in caplog.messages if "is not judged" in line)
        assert last.startswith(f"Step 3 is not judged: max_requests={asked + 5} is reached.")
        # What a part of the prompts says is no number of step 2
        assert [line["step"] for line in capped.state.log_history if "eval_win_rate" in line] == [1]
        whole, _ = judged_training(server, tmp_path / "out", tiny_model_dir, **BEST)
        whole.train()
        assert whole.state.best_global_step == 2


def test_sets_of_rows_and_other_callbacks(tmp_path, tiny_model_dir):
    """A step is judged once, in a notebook too, which runs a loop; what is added later reads the metrics."""
    judged = []

    class Counted(WrittenAnswers):
        def _answers(self, args, model):
            judged.append(self.trainer.state.global_step)
            return super()._answers(args, model)

    with judging(by_wins) as server:
        trainer, _ = judged_training(server, tmp_path / "out", tiny_model_dir, Counted, max_steps=5, **BEST)
        trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))

        async def notebook():
            trainer.train()

        asyncio.run(notebook())
        assert trainer.state.global_step == 3 and judged == [1, 2, 3]
        # Of the best checkpoint's weights, which were loaded
        assert trainer.evaluate()["eval_win_rate"] == pytest.approx(3 / 7) and judged == [1, 2, 3, 3, 3]
        # Another training begins with another student
        trainer.args.max_steps, trainer.args.eval_steps, trainer.args.load_best_model_at_end = 3, 3, False
        trainer.train()
        assert judged == [1, 2, 3, 3, 3, 3]


def test_of_the_judge_before_a_training(tmp_path, tiny_model_dir, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, tiny_model_dir, metric_for_best_model="score")

    def refusal(kind, rows=ROWS, **changes):
        with pytest.raises(kind) as error:
            JudgeCallback(trainer, rows, EvalJudgeConfig(**{"base_url": server.url, "model": MODEL} | changes))
        return str(error.value)

    with judging(lambda *_: "I like both.") as server:
        assert "metric_for_best_model='score' is not asked for: add score to `metrics`" in refusal(RecipeError)
        trainer.args.metric_for_best_model = None
        assert "no preference that can be read in 4 answers" in refusal(EndpointError)
        assert server.requests == OF_THE_CHECK
        assert refusal(EndpointError, model="unknown").startswith("eval_judge: http")
        assert "no column `completion`" in refusal(TeacherDataError, rows=[{"prompt": "a", "answer": "b"}])
        server.says = by_wins
        line = refusal(RecipeError, metrics=["score"], max_requests=server.requests)
        assert (
            line
            == f"eval_judge.max_requests: {server.requests} is reached before the judge's first verdicts are there. Raise it."
        )
        monkeypatch.delenv("OPENAI_API_KEY")
        assert "the environment has no OPENAI_API_KEY" in refusal(RecipeError)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        settings = EvalJudgeConfig(
            base_url=server.url, model=MODEL, teacher_name=f"org/{MODEL}", journal=str(tmp_path / "j")
        )
        JudgeCallback(trainer, ROWS, settings)
        assert f"The judge {MODEL} is the teacher" in caplog.text


def trained_and_judged(url, output, model):
    """What a process of two ends with."""
    told = []

    class Recorded(JudgeCallback):
        def _answers(self, args, model):
            answers = super()._answers(args, model)
            told.append(list(answers.values()))
            return answers

    trainer = make_trainer(output, model, max_steps=2, per_device_eval_batch_size=2, **BEST)
    judge = EvalJudgeConfig(base_url=url, model=MODEL, max_prompts=7, metrics=["win_rate"], student_max_tokens=5)
    trainer.add_callback(Recorded(trainer, ROWS, judge))
    trainer.train()
    log = [line["eval_win_rate"] for line in trainer.state.log_history if "eval_win_rate" in line]
    return log, trainer.state.best_global_step, told


@pytest.mark.slow
def test_two_processes(tmp_path, tiny_model_dir):
    """Both write answers, one asks, and both have what the judge said."""

    def says(is_points, request, first, second):
        return f"Verdict: {'A' if len(first) > len(second) else 'B'}"

    with judging(says) as server:
        (log, best, told), other = on_processes(2, trained_and_judged, server.url, tmp_path / "out", tiny_model_dir)
        assert (log, best, told) == other and len(log) == 2 and best in (1, 2)
        assert len(told[0]) == 7 and server.requests == len(server.asked) <= 2 * OF_THE_CHECK + 2 * OF_A_STEP
        assert len({json.dumps(body) for body in server.asked}) == server.requests
