"""What a judge in a training is asked about, without a training: the students' answers, the report's, an end by Ctrl-C."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from tests.collect.server import KEY, MODEL
from tests.judging.helpers import judging
from trl_bbkd import EvalJudgeConfig
from trl_bbkd.collect.run import End
from trl_bbkd.data.teacher_data import prompt_token_ids
from trl_bbkd.judging import callback, in_training
from trl_bbkd.judging.callback import JudgeCallback
from trl_bbkd.judging.in_training import TrainingJudge
from trl_bbkd.runs.job import Job
from trl_bbkd.runs.text_job import TextJob


ROWS = [{"prompt": f"Q{n}", "completion": f"t{n}"} for n in range(3)]
SHOUTS = "{% for turn in messages %}{{ (turn['content'] | upper if loud else turn['content']) + ' ' + (name or '') }}{% endfor %}"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judge_of(tmp_path, rows=ROWS, url="http://127.0.0.1:9/v1", **settings):
    return TrainingJudge(EvalJudgeConfig(base_url=url, model=MODEL, **settings), str(tmp_path), rows)


class TestTheStudentsAnswers:
    @pytest.fixture
    def tokenizer(self, tiny_model_dir):
        return AutoTokenizer.from_pretrained(tiny_model_dir)

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch, tokenizer):
        """What the engine is given, and the answers that come of its ids."""

        def ask(rows=ROWS, arguments=None, **settings):
            given = {}

            def generate(model, tokenizer, prompts, **kwargs):
                given.update(kwargs)
                return [[[*tokenizer(" a cat")["input_ids"], tokenizer.eos_token_id]] for _ in prompts]

            monkeypatch.setattr(callback, "generate_completion_ids", generate)
            args = SimpleNamespace(per_device_eval_batch_size=5, disable_tqdm=True, **(arguments or {}))
            trainer = SimpleNamespace(processing_class=tokenizer)
            judge = judge_of(tmp_path, rows, **settings)
            found = JudgeCallback._answers(SimpleNamespace(trainer=trainer, judge=judge), args, None)
            assert set(found) == set(judge.prompts)
            return given, [text for (text,) in found.values()]

        return ask

    def test_are_as_long_and_as_random_as_is_said(self, asked):
        given, answers = asked(arguments={"max_completion_length": 7})
        assert (given["max_new_tokens"], given["temperature"], given["is_shared"]) == (7, 0.0, True)
        # Without the token that ends them
        assert answers == [" a cat"] * 3
        given, _ = asked(arguments={"max_completion_length": 7}, student_max_tokens=9, student_temperature=0.5)
        assert (given["max_new_tokens"], given["temperature"]) == (9, 0.5)
        assert asked()[0]["max_new_tokens"] == 512

    def test_are_to_the_prompts_as_the_training_renders_them(self, asked, tokenizer):
        """By the configuration's settings of the template, and by a row's own."""
        tokenizer.chat_template = SHOUTS
        prompt = [{"role": "user", "content": "Name a cat."}]
        rows = [
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": "x"}],
                "chat_template_kwargs": {"name": name},
            }
            for name in ("dog",)
        ]
        settings = {"loud": True}
        given, _ = asked(rows, {"chat_template_kwargs": settings})
        assert given["prompt_ids"] == prompt_token_ids(tokenizer, [prompt], {"loud": True, "name": "dog"})
        assert given["prompt_ids"] != prompt_token_ids(tokenizer, [prompt], {"name": "dog"})


def test_a_report_asks_about_the_first_prompts_and_samples(tmp_path, capsys):
    shown = []

    def says(is_points, request, *both):
        shown.append((request, {*both}))
        return "Verdict: tie"

    lines = [
        {"rows": [n], "prompt": f"Q{n}", "teacher": [f"t{n}"]}
        | {"students": {"GAD": {"samples": {"t1.0": [f"s{n}", "another"], "greedy": ["a third"]}}}}
        for n in range(3)
    ]
    with judging(says) as server:
        judge = judge_of(tmp_path, url=server.url, max_prompts=2)
        found, problems = judge.report(lines, ["GAD"], "t1.0")
        assert server.requests == 4 and not problems and "at most 4 requests" in capsys.readouterr().out
    assert sorted(shown, key=lambda each: each[0]) == [(f"Q{n}", {f"s{n}", f"t{n}"}) for n in (0, 0, 1, 1)]
    assert found["students"]["GAD"]["win_rate"]["prompts"] == 2


def test_verdicts_that_are_missing_count_once(tmp_path):
    """Of two metrics that share them."""
    with judging(lambda _, request, *both: "I like both." if request == "Q1" else "Verdict: A") as server:
        judge = judge_of(tmp_path, url=server.url)
        judged = judge.judge({key: ["s"] for key in judge.prompts}, "step-1")
    assert judged.values["judge_missing"] == 2 and judged.measured["lc_win_rate"].unparsable == 2


def test_ctrl_c_while_the_judge_is_asked_ends_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(in_training, "ask_judge", lambda *_: End("interrupt", ""))
    judge = judge_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        judge.judge({key: ["s"] for key in judge.prompts}, "step-1")


def test_a_judge_decides_on_nothing_that_is_trained():
    """A run that was stopped goes on with another judge."""
    args = SimpleNamespace(to_dict=dict, world_size=1)

    def described(**script_args):
        recipe = SimpleNamespace(model_args=SimpleNamespace())
        script = SimpleNamespace(**script_args)
        job = SimpleNamespace(args=args, script_args=script, inputs={}, held_out_rows=[], recipe=recipe)
        return Job.describe(job)

    assert described(eval_judge={"model": "a"}, seqkd_baseline=True) == described(eval_judge=None, seqkd_baseline=True)
    assert described(eval_judge=None, seqkd_baseline=True) != described(eval_judge=None, seqkd_baseline=False)


def test_a_judge_that_fails_at_the_report_is_a_warning_of_it():
    judge = SimpleNamespace(
        report=lambda lines, students, at: ({"students": {}}, [f"not all of {students}'s at {at}"])
    )
    report = SimpleNamespace(results={"GAD": {}, "teacher": {}}, at="t1.0", warnings=[], verdicts_of_judge=None)
    job = SimpleNamespace(script_args=SimpleNamespace(seqkd_baseline=False), judge="a judge", is_main_process=True)
    vars(job).update(progress={"GAD": {}}, max_steps=3, _held_out=lambda *_: [], _training_judge=lambda: judge)
    TextJob.add_baselines(job, report)
    assert report.warnings == [{"kind": "judge", "step": 3, "text": "not all of ['GAD']'s at t1.0"}]
    assert report.verdicts_of_judge == {"students": {}}
