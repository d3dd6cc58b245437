"""Benchmarks by tasks of lm_eval that lie on disk: values by hand, a second run, adapters, beside a judge."""

import json
import shutil
import statistics

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.judging.helpers import evaluate as judge
from tests.judging.helpers import files, judging
from tests.tasks.helpers import CHOICES, ask, write_task, write_writing_task
from trl_bbkd.tasks.report import results_of


pytest.importorskip("lm_eval")


@pytest.fixture
def loads(monkeypatch):
    """The students whose weights were loaded."""
    from trl_bbkd.evaluation import loading

    found, load = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda path, **kwargs: found.append(path) or load(path, **kwargs))
    return found


def chosen(model, tokenizer, question, choices):
    """The choice with the highest likelihood after the question, one forward pass a choice."""
    totals = []
    for choice in choices:
        start = tokenizer(question)["input_ids"]
        ids = tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        totals.append(sum(logps[place - 1, ids[place]].item() for place in range(len(start), len(ids))))
    return totals.index(max(totals)), totals


def test_values_by_hand(tmp_path, tiny_model_dir, capsys, loads):
    """Choices and written answers; standard output is the table alone, and a second run loads no weights."""
    (tmp_path / "mine").mkdir()
    write_task(tmp_path / "mine"), write_writing_task(tmp_path / "mine")
    found, page = ask(tmp_path, tiny_model_dir, tmp_path / "mine")
    printed = capsys.readouterr().out
    assert printed == page.split("\n\n", 1)[1]
    model, tokenizer = (kind.from_pretrained(tiny_model_dir) for kind in (AutoModelForCausalLM, AutoTokenizer))
    red, writing = found["benchmarks"]["results"]
    picks = [chosen(model, tokenizer, row["question"], row["choices"]) for row in CHOICES]
    right = [float(pick == row["gold"]) for (pick, _), row in zip(picks, CHOICES, strict=True)]
    assert 0 < sum(right) < 7 and red["value"] == pytest.approx(statistics.mean(right))
    assert (red["task"], red["version"], red["metric"], red["filter"], red["n_shot"]) == (
        "red",
        "1.5",
        "acc",
        "none",
        0,
    )
    error = statistics.stdev(right) / 7**0.5
    assert red["standard_error"] == pytest.approx(error) and red["rows"] == red["of"] == 7
    assert red["high"] - red["value"] == pytest.approx(1.959964 * error) == pytest.approx(red["value"] - red["low"])
    line = f"| `red` | 1.5 | none | 0 | `acc` ↑ | {red['value']:.3f} | {red['low']:.3f} to {red['high']:.3f} | 7 |"
    assert line in page and found["benchmarks"]["lm_eval"] in page
    samples = [json.loads(line) for line in (tmp_path / "out/benchmarks/red.jsonl").read_text().splitlines()]
    for (_, totals), sample in zip(picks, samples, strict=True):
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(totals, abs=1e-3)
    samples = [json.loads(line) for line in (tmp_path / "out/benchmarks/writing.jsonl").read_text().splitlines()]
    texts = []
    for row in CHOICES:
        ids = tokenizer(row["question"], return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].size(1) :]
        texts.append(tokenizer.decode(written, skip_special_tokens=True).split("\n")[0])
    assert any(texts) and [sample["resps"] for sample in samples] == [[[text]] for text in texts]
    assert writing["metric"] == "exact_match" and writing["value"] == 0 and writing["low"] is None
    assert loads == [tiny_model_dir]
    assert ask(tmp_path, tiny_model_dir, tmp_path / "mine") == (found, page) and len(loads) == 1


def test_what_is_asked_anew(tmp_path, tiny_model_dir, other_model_dir, loads):
    """Another student, other rows, another function, another setting; a task that is added leaves the others alone."""
    folder = tmp_path / "mine"
    folder.mkdir()
    task = write_task(folder, doc_to_text="QUESTION")
    task.write_text(task.read_text().replace("QUESTION", "!function words.question"))
    (folder / "words.py").write_text("def question(row):\n    return row['question']\n")
    first, _ = ask(tmp_path, tiny_model_dir, task)
    record = tmp_path / "out/benchmarks/red.json"
    kept = record.read_text()
    ask(tmp_path, tiny_model_dir, task, write_writing_task(folder))
    assert len(loads) == 2 and record.read_text() == kept
    second, page = ask(tmp_path, other_model_dir, task)
    assert loads[2:] == [other_model_dir] and other_model_dir in page and tiny_model_dir not in page
    assert record.read_text() != kept and second["student"] == other_model_dir
    for change in (
        lambda: (folder / "words.py").write_text("def question(row):\n    return 'Q: ' + row['question']\n"),
        lambda: write_task(folder, rows=[*CHOICES, CHOICES[0]], file="another.yaml"),
    ):
        before = len(loads)
        change()
        ask(tmp_path, other_model_dir, task)
        assert len(loads) == before + 1
    limited, page = ask(tmp_path, other_model_dir, task, options=["--limit", 2, "--num_fewshot", 1])
    (result,) = limited["benchmarks"]["results"]
    assert len(loads) == 6 and (result["rows"], result["of"], result["n_shot"]) == (2, 8, 1)
    assert result["low"] is None and "| 2 of 8 |" in page and "Warning: --limit 2: of red the first rows alone" in page


def test_settings_that_ask_anew(tmp_path, tiny_model_dir, loads, monkeypatch):
    """Rows, template, few-shot examples, lm_eval's version: each alone."""
    shutil.copytree(tiny_model_dir, model := tmp_path / "model")
    (tmp_path / "mine").mkdir()
    task = write_task(tmp_path / "mine")
    templated = ["--apply_chat_template"]

    def asked(*options):
        before = len(loads)
        ask(tmp_path, model, task, options=options)
        return len(loads) - before

    assert [asked("--limit", 3), asked("--limit", 3), asked(), asked(*templated), asked(*templated)] == [1, 0, 1, 1, 0]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    assert asked(*templated) == 1
    keys = yaml.safe_load(task.read_text())
    keys["dataset_kwargs"]["data_files"]["train"] = str(tmp_path / "examples.jsonl")
    task.write_text(yaml.safe_dump(keys | {"training_split": "train", "num_fewshot": 1}))
    for gold in (0, 1):
        (tmp_path / "examples.jsonl").write_text(json.dumps(CHOICES[5] | {"gold": gold}) + "\n")
        assert [asked(), asked()] == [1, 0]
    monkeypatch.setattr("lm_eval.__version__", "0")
    assert asked() == 1


def test_a_task_that_says_no_examples_means_it(tmp_path, tiny_model_dir):
    tasks = write_task(tmp_path, num_fewshot=0), write_task(tmp_path, "blue")
    found, _ = ask(tmp_path, tiny_model_dir, *tasks, options=["--num_fewshot", 1])
    assert {result["task"]: result["n_shot"] for result in found["benchmarks"]["results"]} == {"red": 0, "blue": 1}


@pytest.mark.parametrize(("rows", "has_interval"), [(5, False), (6, True)])
def test_an_interval_needs_rows(rows, has_interval):
    found = {"red": {"sample_len": rows, "acc,none": 0.4, "acc_stderr,none": 0.1}}
    (result,) = results_of(
        {"results": found} | dict.fromkeys(("n-samples", "higher_is_better", "versions", "n-shot"), {})
    )
    assert (result.low is not None) == has_interval


BROKEN = ["{", "[]", "{}", '{"how": HOW, "results": [{"task": "red"}]}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_record_that_is_broken_is_made_anew(tmp_path, tiny_model_dir, loads, text):
    task = write_task(tmp_path)
    found = ask(tmp_path, tiny_model_dir, task)
    record = tmp_path / "out/benchmarks/red.json"
    record.write_text(text.replace("HOW", json.dumps(json.loads(record.read_text())["how"])))
    assert ask(tmp_path, tiny_model_dir, task) == found and len(loads) == 2


def test_a_function_that_fails_at_work_is_one_line(tmp_path, tiny_model_dir, capsys):
    """It names the line; what other tasks have come to is kept."""
    task = write_writing_task(tmp_path, process_results="RESULTS")
    task.write_text(task.read_text().replace("RESULTS", "!function words.results"))
    (tmp_path / "words.py").write_text("def results(row, answers):\n    raise KeyError('gone')\n")
    with pytest.raises(SystemExit) as stopped:
        ask(tmp_path, tiny_model_dir, write_task(tmp_path), task)
    assert stopped.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == (
        f"error: --tasks: writing ended with KeyError: 'gone' ({tmp_path}/words.py, line 2). Mend that; the same command goes on with "
        "what is missing."
    )
    assert [path.name for path in (tmp_path / "out/benchmarks").glob("*.json")] == ["red.json"]


def test_an_adapter_is_asked_with_its_base_model(tmp_path, tiny_model_dir):
    """One without a tokenizer of its own, whose B is not zero, answers otherwise than its base model, and is known from it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    task = write_task(tmp_path)
    ask(tmp_path, tmp_path / "adapter", task)
    samples = (tmp_path / "out/benchmarks/red.jsonl").read_text()
    (tmp_path / "merged").mkdir()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "merged")

    def likelihoods(text):
        lines = map(json.loads, text.splitlines())
        return [float(answer[0]) for line in lines for answer in line["filtered_resps"]]

    ask(tmp_path, tmp_path / "merged", task)
    merged = (tmp_path / "out/benchmarks/red.jsonl").read_text()
    assert likelihoods(samples) == pytest.approx(likelihoods(merged), abs=1e-2)
    ask(tmp_path, tiny_model_dir, task)
    assert likelihoods(samples) != pytest.approx(
        likelihoods((tmp_path / "out/benchmarks/red.jsonl").read_text()), abs=0.1
    )


def test_the_chat_template(tmp_path, tiny_model_dir):
    task = write_task(tmp_path)
    _, page = ask(tmp_path, tiny_model_dir, task, options=["--apply_chat_template"])
    sample = json.loads((tmp_path / "out/benchmarks/red.jsonl").read_text().splitlines()[0])
    assert (
        sample["arguments"][0][0] == f"<|im_start|>user\n{CHOICES[0]['question']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "rendered with the student's chat template" in page


def test_a_group_and_names_of_a_folder(tmp_path, tiny_model_dir, few_tasks):
    """A group has its mean over rows; what is in it is not asked twice. Names of an included folder need no path."""
    write_task(tmp_path / "mine"), write_task(tmp_path / "mine", "other", CHOICES[:3])
    group = {"group": "both", "task": ["red", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "mine/both.yaml").write_text(json.dumps(group))
    found, _ = ask(tmp_path, tiny_model_dir, tmp_path / "mine")
    values = {result["task"]: result for result in found["benchmarks"]["results"]}
    assert set(values) == {"red", "other", "both"} and values["both"]["rows"] == 10
    assert len(found["benchmarks"]["results"]) == 3
    mean = (7 * values["red"]["value"] + 3 * values["other"]["value"]) / 10
    assert values["both"]["value"] == pytest.approx(mean)
    found, _ = ask(tmp_path, tiny_model_dir, "red,other", options=["--include_path", tmp_path / "mine"])
    assert [result["value"] for result in found["benchmarks"]["results"]] == [
        values["red"]["value"],
        values["other"]["value"],
    ]


@pytest.fixture
def few_tasks(tmp_path, monkeypatch):
    """lm_eval with two tasks of its own: reading the list of all takes it half a minute here."""
    from lm_eval.tasks import manager

    for name in ("mine", "stock"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "stock/manager.py"))


def test_beside_a_judge(tmp_path, tiny_model_dir, capsys):
    """One command, one page with both tables; what is there is neither asked nor computed again."""
    files(tmp_path, [(row["question"], "s", "t") for row in CHOICES])
    task = write_task(tmp_path)
    changes = {"metric": "win_rate", "tasks": task, "student_max_tokens": 4, "model": tiny_model_dir}
    with judging(lambda *_: "Verdict: A") as server:
        found, page = judge(server, tmp_path, **changes)
        asked = server.requests
        assert judge(server, tmp_path, **changes) == (found, page) and server.requests == asked == 4 + 14
    assert found["metrics"]["win_rate"]["value"] == 0.5 and found["benchmarks"]["results"][0]["task"] == "red"
    assert page.index("`win_rate`") < page.index("## Benchmarks") < page.index("| `red` |")


@pytest.mark.slow
def test_a_name_of_lm_eval_is_found(tmp_path, tiny_model_dir, capsys):
    """In its whole list. Its rows are on the Hub."""
    with pytest.raises(SystemExit):
        ask(tmp_path, tiny_model_dir, "hellaswagg")
    assert "lm_eval has no task 'hellaswagg'; did you mean 'hellaswag'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ask(tmp_path, tiny_model_dir, "hellaswag")
    assert (
        "--tasks: hellaswag cannot be loaded: Couldn't reach 'Rowan/hellaswag' on the Hub" in capsys.readouterr().err
    )
