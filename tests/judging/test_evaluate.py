"""The command, beside a judge on this machine: the table by hand, biased judges, a second run."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from tests.collect.server import KEY
from tests.collect.test_command import HEAVY
from tests.collect.test_secrets import found_in
from tests.judging.helpers import command, evaluate, files, judging, write_rows
from trl_bbkd.cli import main
from trl_bbkd.judging import student
from trl_bbkd.judging.settings import JUDGE_KEYS, OWN_KEYS


# Prompt, the student's answer, the teacher's, and their points
BY_HAND = {
    ("Q0", "s0", "t0"): (5, 5),
    ("Q1", "s1", "t1"): (9, 3),
    ("Q2", "s2", "t2"): (2, 8),
    ("Q3", "s3", "t3"): (1, 9),
    ("Q4", "s4", "t4"): (4, 6),
    ("Q5", "s5", "t5"): (6, 6),
    ("Q6", "s6", "t6"): (3, 7),
}


def by_points(points):
    def says(is_points, request, first, second):
        if (first, second) == ("t6", "s6") and not is_points:
            return "I cannot decide.\nVerdict: both"
        a, b = points[first], points[second]
        if is_points:
            return f"So it is.\nPoints: A {a}, B {b}"
        return f"So it is.\nVerdict: {'tie' if a == b else 'A' if a > b else 'B'}"

    return says


def test_the_table_by_hand(tmp_path):
    """Also its cost, what is said of verdicts that cannot be read, and that a second run asks for nothing."""
    points = {
        text: value for (_, *texts), values in BY_HAND.items() for text, value in zip(texts, values, strict=True)
    }
    files(tmp_path, BY_HAND)
    with judging(by_points(points)) as server:
        prices = {"prompt_price": 1, "completion_price": 10}
        found, page = evaluate(server, tmp_path, **prices)
        asked = server.requests
        assert asked == len(server.asked) == 7 * 2 * 2 and all(body["temperature"] == 0 for body in server.asked)
        assert len({json.dumps(body) for body in server.asked}) == asked
        again, page_again = evaluate(server, tmp_path, **prices)
        assert server.requests == asked and again == found and page_again == page
        lines = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
        assert len(lines) == 28 and [line["state"] for line in lines].count("unparsable") == 1
        one, _ = evaluate(server, tmp_path, metric="score", **prices)
        assert server.requests == asked and list(one["metrics"]) == ["score"]
        assert one["metrics"]["score"] == found["metrics"]["score"]
    wins, controlled, score = (found["metrics"][name] for name in ("win_rate", "lc_win_rate", "score"))
    # Of six prompts: tie, win, loss, loss, loss, tie; the seventh has one verdict alone
    assert wins["value"] == pytest.approx((0.5 + 1 + 0 + 0 + 0 + 0.5) / 6)
    assert (wins["prompts"], wins["pairs"], wins["unparsable"], controlled["unparsable"]) == (6, 6, 1, 1)
    assert wins["low"] < wins["value"] < wins["high"] and wins["orders_agree"] == 1 and wins["first_is_chosen"] == 0.5
    shares = [5 / 10, 9 / 12, 2 / 10, 1 / 10, 4 / 10, 6 / 12, 3 / 10]
    assert score["value"] == pytest.approx(np.mean(shares)) and (score["prompts"], score["unparsable"]) == (7, 0)
    assert score["points_of_student"] == pytest.approx(30 / 7) and score["verdict"] == "no difference seen"
    tokens = server.paid_tokens
    assert found["journal"]["requests"] == asked and found["journal"]["prompt"] == tokens["prompt"]
    paid = (tokens["prompt"] + 10 * tokens["completion"]) / 1e6
    assert wins["cost"] + score["cost"] == pytest.approx(paid) == pytest.approx(found["journal"]["cost"])
    assert wins["cost"] == controlled["cost"]
    assert f"| `win_rate` | 0.333 | {wins['low']:.3f} to {wins['high']:.3f} | 6 | 1 | `teacher-1` |" in page
    assert not any("the judge is the teacher" in line for line in found["warnings"])


def chance(*texts):
    """A number between 0 and 1 that follows from texts alone."""
    return int.from_bytes(hashlib.sha256("|".join(texts).encode()).digest()[:6]) / 2**48


def simulated(logits):
    """A judge whose choices have these odds of the first answer."""

    def says(is_points, request, first, second):
        odds = 1 / (1 + np.exp(-logits(first, second)))
        return f"Verdict: {'A' if chance(request, first, second) < odds else 'B'}"

    return says


def test_a_liking_for_the_first_place_cancels(tmp_path):
    """A judge that always chooses the first finds both equal; one that leans to it finds the better one the better."""
    answers = [(f"Question {n}?", f"s{n}", f"t{n}") for n in range(60)]
    files(tmp_path, answers)
    with judging(simulated(lambda first, second: 99.0)) as server:
        found, page = evaluate(server, tmp_path, metric=["win_rate", "lc_win_rate"])
    always = found["metrics"]["win_rate"]
    assert always["value"] == 0.5 and always["low"] is None and always["first_is_chosen"] == 1
    assert found["metrics"]["lc_win_rate"]["value"] == pytest.approx(0.5) and "no interval" in page
    for better, verdict in ((0.0, "no difference seen"), (-1.5, "worse than the teacher")):
        with judging(simulated(lambda a, b, s=better: 1.5 + (s if a[0] == "s" else -s))) as server:
            found, _ = evaluate(server, tmp_path, metric="win_rate", journal=tmp_path / f"{better}.sqlite")
        assert found["metrics"]["win_rate"]["verdict"] == verdict
        assert found["metrics"]["win_rate"]["first_is_chosen"] > 0.65


def test_a_liking_for_length_is_taken_out(tmp_path):
    """The student is as good as the teacher, and longer: its plain rate says that it is better."""
    lengths = 20 + (380 * np.random.default_rng(0).random(80)).astype(int)
    answers = [(f"Question {n}?", "s" * lengths[n], "t" * 60) for n in range(80)]
    files(tmp_path, answers)
    spread = (lengths - 60).std()
    with judging(simulated(lambda a, b: 0.5 + 2.0 * np.tanh((len(a) - len(b)) / spread))) as server:
        found, _ = evaluate(server, tmp_path, metric=["win_rate", "lc_win_rate"])
    plain, controlled = found["metrics"]["win_rate"], found["metrics"]["lc_win_rate"]
    assert plain["verdict"] == "better than the teacher" and controlled["verdict"] == "no difference seen"
    assert controlled["low"] <= 0.5 <= controlled["high"] and controlled["length_effect"] > 1


EQUAL = "It is hard to say.\nVerdict: tie"


def test_several_answers_and_forms_of_prompts(tmp_path):
    """Pairs of a prompt count as one draw; a text and a user's message are one prompt; what is not asked about is told."""
    rows = [{"prompt": [{"role": "user", "content": f"Q{n}"}], "completion": [{"role": "assistant", "content": a}]}
            for n in range(3) for a in ("x", "yy")]  # fmt: skip
    write_rows(tmp_path / "teacher.jsonl", [row | {"teacher": "teacher-1"} for row in rows])
    answers = [("Q0", "s"), ("Q0", "x"), ("Q0", "s"), ("Q2", ""), ("Q9", "s")]
    write_rows(tmp_path / "student.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in answers])
    with judging(lambda *_: EQUAL) as server:
        found, page = evaluate(server, tmp_path, metric="win_rate")
    metric = found["metrics"]["win_rate"]
    assert (metric["prompts"], metric["pairs"], metric["value"]) == (2, 4, 0.5)
    # ("s", "x") twice over, and ("x", "yy"), ("", "x"), each in two orders
    assert server.requests == 6
    said = " ".join(found["warnings"])
    assert "the judge is the teacher, teacher-1" in said and "1 of 3 prompts have no answer" in said
    assert "there is no test split" in said and "> Warning: the judge is the teacher" in page


def test_a_cap_leaves_a_table_of_what_is_there(tmp_path):
    files(tmp_path, [(f"Question {n}?", f"s{n}", f"t{n}") for n in range(12)])
    with judging(lambda *_: EQUAL) as server:
        found, page = evaluate(server, tmp_path, metric="win_rate", max_requests=17)
        assert server.requests == 17
        metric = found["metrics"]["win_rate"]
        assert (metric["pairs"], metric["not_asked"]) == (8, 7) and "7 verdicts not asked" in page
        assert "stopped at --max_requests 17. The same command goes on." in found["warnings"]
        found, _ = evaluate(server, tmp_path, metric="win_rate")
        assert server.requests == 24 and found["metrics"]["win_rate"]["pairs"] == 12


def test_a_student_is_sampled_once(tmp_path, monkeypatch, tiny_model_dir, conversational_rows):
    """The held-out rows of a recipe; again, and as an adapter of the same model."""
    write_rows(tmp_path / "teacher.jsonl", conversational_rows)
    options = {"model": tiny_model_dir, "metric": "win_rate", "test_split_size": 8, "student_max_tokens": 8}
    with judging(lambda *_: EQUAL) as server:
        found, _ = evaluate(server, tmp_path, **options)
        requests = server.requests
        prompts = found["metrics"]["win_rate"]["prompts"]
        assert 0 < prompts <= 4 and not any("no test split" in line for line in found["warnings"])
        lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
        assert len(lines) == prompts and lines[0]["prompt"][0]["role"] == "user"
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        # An adapter as it begins says what its base model says
        evaluate(server, tmp_path, **options | {"model": "adapter", "output_dir": tmp_path / "other"} | {
            "journal": tmp_path / "out/journal.sqlite"})  # fmt: skip
        assert server.requests == requests
        assert (tmp_path / "other/answers.jsonl").read_text() == (tmp_path / "out/answers.jsonl").read_text()
        monkeypatch.setattr(student, "_sample", None)
        again, _ = evaluate(server, tmp_path, **options)
        assert server.requests == requests and again == found


@pytest.mark.parametrize("refuses", [False, True])
def test_the_key_is_nowhere(tmp_path, monkeypatch, capfd, caplog, refuses):
    """Where the judge quotes it, in its verdicts or in its refusal."""
    caplog.set_level("DEBUG")
    files(tmp_path, BY_HAND)
    with judging(lambda *_: EQUAL, echoes_key=True) as server:
        if refuses:
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
            with pytest.raises(SystemExit):
                main(command(server, tmp_path, judge="unknown"))
        else:
            evaluate(server, tmp_path, metric="win_rate")
    out, err = capfd.readouterr()
    assert found_in(tmp_path, out, err, caplog.text) == []
    assert ("***" in err) if refuses else "***" in (tmp_path / "out/verdicts.jsonl").read_text()


def test_help_imports_nothing_heavy():
    code = (
        "import sys, time\nbegin = time.process_time()\nfrom trl_bbkd.cli import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        f"print(time.process_time() - begin, [name for name in {(*HEAVY, 'numpy')} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, loaded = done.stderr.strip().partition(" ")
    assert loaded == "[]" and float(seconds) < 0.3
    assert all(f"--{name} " in done.stdout for name in ("data", "judge", "output_dir", *OWN_KEYS, *JUDGE_KEYS))
