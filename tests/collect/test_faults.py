"""Every fault at once: no row is lost, none is paid twice, no cap is exceeded, and every failure is listed."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.collect.helpers import left_out, prompts_file, rows, write_recipe
from tests.collect.server import KEY, LASTING, NOTED, TRANSIENT, TeacherServer, answer
from trl_bbkd.cli import main


CODE = "from trl_bbkd.cli import main; main()"
CONCURRENCY = 16
ALWAYS = ("500", "429 ms")
ONCE = [f"[{kind}]" for kind in TRANSIENT]
KINDS = [*ONCE, *(f"[{kind}]" for kind in (*LASTING, *NOTED)), *(f"[{kind}!]" for kind in ALWAYS)]
LEFT_OUT = {"null": "empty", "empty": "empty", "length": "length", "filter": "content_filter"}
LEFT_OUT |= {"thought": "cut in its thought", "refusal": "refusal", "call": "tool call beside texts"}
FAILED = {"[400]": "status 400", "[422]": "status 422", "[500!]": "status 500", "[429 ms!]": "rate limit"}
PAID_AND_LOST = ("cut", "malformed")


def prompts(count, share_of_faults, dice):
    """Mostly prompts that nothing happens to; the first is one of them."""
    faulty = [f"{KINDS[i % len(KINDS)]} Question {i}?" for i in range(int(count * share_of_faults))]
    plain = [f"Question {i}?" for i in range(len(faulty), count)]
    rest = plain[1:] + faulty
    dice.shuffle(rest)
    return [plain[0], *rest]


def start(recipe, *words):
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    command = [sys.executable, "-c", CODE, "collect", str(recipe), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_after(process, server, requests):
    """SIGKILL once the server has had so many requests, in the middle of whatever is in flight."""
    while server.requests < requests and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, process.stderr.read()


def finish(recipe):
    """As [`start`], in this process and to the end; return what was told."""
    os.environ["OPENAI_API_KEY"] = KEY
    with contextlib.redirect_stderr(io.StringIO()) as told:
        main(["collect", str(recipe)])
    return told.getvalue()


def kind_of(prompt):
    return prompt.partition("] ")[0] + "]" if prompt.startswith("[") else ""


def check(folder, asked):
    """The set and the list have each prompt once, for its own reason."""
    found = rows(folder)
    order = {prompt: place for place, prompt in enumerate(asked)}
    assert [row["prompt"] for row in found] == sorted((row["prompt"] for row in found), key=order.__getitem__)
    for row in found:
        body = {
            "messages": [{"role": "user", "content": row["prompt"]}],
            "temperature": 0.0,
            "seed": 0,
            "max_tokens": 64,
        }
        whole = " ".join(answer(body, 0))
        assert row["completion"] == whole
    listed = {line["row"]: line for line in left_out(folder)}
    assert len(listed) == len(left_out(folder))
    for place, prompt in enumerate(asked):
        line, kind = listed.pop(place, {}), kind_of(prompt)
        reason = LEFT_OUT.get(kind.strip("[]"))
        assert line.get("left_out") == reason and line.get("failed") == FAILED.get(kind), (prompt, line)
    assert not listed
    kept = {row["prompt"] for row in found}
    assert kept == {p for p in asked if kind_of(p) not in FAILED and kind_of(p).strip("[]") not in LEFT_OUT}
    assert len(found) == len(kept)


def answers_to(server):
    return Counter({about: count for about, count in server.answers.items() if about[0] != ""})


def suite(folder, count, kills, dice, **changes):
    """Collect, with so many kills; return the server and what was told last."""
    asked = prompts(count, 0.5, dice)
    prompts_file(folder, asked)
    with TeacherServer(latency=0.01) as server:
        caps = {"max_requests": 4 * count, "max_total_tokens": 10_000 * count, "max_cost": 1e6}
        prices = {"prompt_price": 1.0, "completion_price": 2.0}
        said = caps | prices | {"concurrency": CONCURRENCY, "request_timeout": 1.0, "max_retries": 2}
        recipe = write_recipe(server, folder, **said | changes)
        for at in sorted(dice.sample(range(count // 10, count), kills)):
            kill_after(start(recipe), server, at)
        before = answers_to(server).total()
        told = finish(recipe)
        requests = server.requests
        # Nothing is left to ask
        finish(recipe)
        assert server.requests == requests
    check(folder, asked)
    assert before < answers_to(server).total()
    return server, told, asked


def check_costs(server, asked, kills, told):
    accepted = sum(1 for prompt in asked if kind_of(prompt) not in FAILED)
    lost = sum(1 for prompt in asked if kind_of(prompt).strip("[]") in PAID_AND_LOST)
    repeats = answers_to(server).total() - accepted
    assert 0 <= repeats <= kills * CONCURRENCY, repeats
    assert server.paid <= accepted + lost + kills * CONCURRENCY
    assert server.most_in_flight <= 2 * CONCURRENCY  # a killed process's, and the next one's
    if not kills:
        assert repeats == 0 and server.paid == accepted + lost
        # Each fault that passes is met once; those that stay, as often as they are tried
        always = Counter(map(kind_of, asked))
        passing = sum(always[kind] for kind in ONCE)
        assert server.requests == len(asked) + passing + 2 * always["[500!]"] + 20 * always["[429 ms!]"]
    return repeats


def test_every_fault(tmp_path):
    assert len(KINDS) >= 18
    server, told, asked = suite(tmp_path, 160, 0, random.Random(0))
    check_costs(server, asked, 0, told)


@pytest.mark.slow
def test_killed_and_gone_on_with(tmp_path):
    """At random points, with every fault: the set equals one of an undisturbed run."""
    server, told, asked = suite(tmp_path, 160, 2, random.Random(1))
    check_costs(server, asked, 2, told)
    (tmp_path / "calm").mkdir()
    prompts_file(tmp_path / "calm", asked)
    with TeacherServer() as calm:
        finish(write_recipe(calm, tmp_path / "calm", request_timeout=1.0, max_retries=2, concurrency=64))
    assert rows(tmp_path) == rows(tmp_path / "calm")
    assert [line | {"attempts": 0} for line in left_out(tmp_path)] == [
        line | {"attempts": 0} for line in left_out(tmp_path / "calm")
    ]


@pytest.mark.parametrize(
    "cap",
    [
        pytest.param("max_requests", marks=pytest.mark.slow),
        pytest.param("max_total_tokens", marks=pytest.mark.slow),
        "max_cost",
    ],
)
def test_caps_hold_through_kills(tmp_path, cap):
    """What a killed process had in flight counts at its worst."""
    prompts_file(tmp_path, prompts(120, 0.3, random.Random(2)))
    limits = {"max_requests": 60, "max_total_tokens": 2500, "max_cost": 0.0025}
    with TeacherServer(latency=0.01) as server:
        prices = {"prompt_price": 1.0, "completion_price": 1.0}
        recipe = write_recipe(server, tmp_path, request_timeout=1.0, **{cap: limits[cap]}, **prices)
        kill_after(start(recipe), server, 20)
        for _ in range(2):
            assert f"Stopped at `{cap}: " in finish(recipe)
        tokens = server.paid_tokens.total()
        taken = {"max_requests": server.requests, "max_total_tokens": tokens, "max_cost": tokens / 1e6}[cap]
        assert 0.2 * limits[cap] < taken <= limits[cap]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [0, 5])
def test_two_thousand_prompts(tmp_path, kills):
    server, told, asked = suite(tmp_path, 2000, kills, random.Random(3))
    repeats = check_costs(server, asked, kills, told)
    accepted = sum(1 for prompt in asked if kind_of(prompt) not in FAILED)
    figures = {
        "kinds": len(KINDS),
        "requests": server.requests,
        "paid": server.paid,
        "accepted": accepted,
        "repeats": repeats,
    }
    print(json.dumps(figures | {"kills": kills, "rows": len(rows(tmp_path)), "listed": len(left_out(tmp_path))}), told)
