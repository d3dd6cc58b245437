"""A recipe whose rows share prompts."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import JUDGE, build_model
from tests.recipes import write_recipe
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.runs.text_job import TextJob


@pytest.fixture
def folder(tmp_path):
    """Three answers to each of 16 training and 4 test prompts."""
    for split, prompts in (("train", range(16)), ("test", range(16, 20))):
        rows = [
            {"prompt": f"Name number {prompt}.", "completion": f" It is {prompt}{ending}"}
            for ending in (".", "!", " blue")
            for prompt in prompts
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def test_a_report_samples_each_prompt_once(folder, tiny_model_dir):
    """Three of the four held-out prompts, with their nine answers."""
    job = TextJob(
        load_recipe(
            write_recipe(
                folder, tiny_model_dir, folder / "out", eval_prompts=3, eval_samples=2, eval_temperatures=[1.0]
            )
        )
    )
    assert len(job.train) == 48 and len(job.held_out_rows) == 9 and job.plan.prompts == 3
    judge, asked, job.progress = job.sample_metrics, [], {}

    def counted(prompts, texts):
        asked.append(prompts)
        return judge(prompts, texts)

    for name, seed in (("GAD", 0), ("SeqKD", 1)):
        by_row: dict[str, list[float]] = {}
        student = AutoModelForCausalLM.from_pretrained(build_model(folder / name, seed=seed))
        metrics = job.measure(student, sample_metrics=counted, by_row=by_row)
        job.progress[name] = {"metrics": metrics, "by_row": by_row}
    assert len(asked[0]) == 6 and len(set(asked[0])) == 3
    differences = job._differences("GAD", "SeqKD")
    for name in ("blue@t1.0", "teacher_nll"):
        own, others = (job.progress[student]["metrics"][name] for student in ("GAD", "SeqKD"))
        assert differences[name]["difference"] == pytest.approx(own - others)
        assert differences[name]["standard_error"] >= 0


@pytest.mark.slow
def test_a_run_reports_prompts(folder, tiny_model_dir):
    run(load_recipe(write_recipe(folder, tiny_model_dir, folder / "out", max_steps=2, eval_prompts=3, eval_samples=2)))
    saved = json.loads((folder / "out" / "metrics.json").read_text())
    assert saved["evaluation"]["prompts"] == 3
    assert {"blue@t1.0", "teacher_nll"} <= set(saved["differences"]["SeqKD"])


def test_one_answer_a_prompt_for_a_method_and_seqkd_beside_it(folder, tiny_model_dir):
    job = TextJob(load_recipe(write_recipe(folder, tiny_model_dir, folder / "out", answers_per_prompt=1)))
    assert len(job.train) == 16 and all(row["completion"].endswith(".") for row in job.train)
    assert len(job.test) == 12 and job.counts["train"].answers_left_out == 32
