"""
What a collection costs its own machine: answers a second against an endpoint that takes 50 ms, as a share of what the latency allows,
processor time for each request, and memory with the number of prompts. Beside it a plain loop over `openai`'s asynchronous client,
which keeps no journal.

    python benchmarks/collect.py
    python benchmarks/collect.py --concurrency 16 64 256 --rows 1000 10000 100000 --clients ours openai

Server and client are processes of their own on this machine, so both take of its cores. `openai` is no dependency of this package:
`pip install openai`, or `--clients ours`. Each figure is of one process; imports and the reading of prompts are not in the seconds.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from common.tables import markdown


ROOT = Path(__file__).parents[1]
STATUS = Path("/proc/self/status")  # of Linux
LATENCY = 0.05
MODEL = "teacher-1"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[16, 64, 256], help="requests in flight")
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 100_000], help="prompts, for the memory")
    parser.add_argument("--seconds", type=float, default=3, help="of a run, were the machine infinitely fast")
    parser.add_argument("--clients", nargs="+", choices=["ours", "openai"], default=["ours", "openai"])
    parser.add_argument("--child", nargs=4, metavar=("CLIENT", "URL", "CONCURRENCY", "ROWS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


@contextmanager
def server(latency: float):
    """Address of a server in a process of its own."""
    command = [sys.executable, "-m", "tests.collect.server", "--latency", str(latency)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def prompt(number: int) -> str:
    return f"Question {number}: what is the answer to it, and why is it not another one?"


def ours(url: str, concurrency: int, rows: int, folder: Path) -> dict:
    from trl_bbkd.collect.answer_set import AnswerSet
    from trl_bbkd.collect.journal import Journal
    from trl_bbkd.collect.prompts import Prompts
    from trl_bbkd.collect.run import Collection
    from trl_bbkd.collect.settings import CollectConfig

    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": prompt(number)}) + "\n" for number in range(rows))
    settings = CollectConfig(
        base_url=url,
        model=MODEL,
        output_dir=str(folder / "out"),
        dataset_name=str(folder / "prompts.jsonl"),
        api_key_env=None,
        temperature=0.0,
        concurrency=concurrency,
    )
    begin = time.process_time()
    prompts = Prompts(settings)
    forget_peak()
    with Journal(folder / "out/journal.sqlite") as journal:
        collection = Collection(settings, prompts, journal, None)
        collection.count()
        around = time.process_time() - begin
        figures = measured(lambda: asyncio.run(collection.run()))
        begin = time.process_time()
        survey = AnswerSet(prompts, collection.maker, journal).write(folder / "out")
        around += time.process_time() - begin
    assert survey.rows == rows
    return {**figures, "around": around}


def plain_openai(url: str, concurrency: int, rows: int, folder: Path) -> dict:
    from openai import AsyncOpenAI

    forget_peak()

    async def loop() -> list[str]:
        answers = []
        numbers = iter(range(rows))
        async with AsyncOpenAI(base_url=url, api_key="none") as client:

            async def work() -> None:
                for number in numbers:
                    messages = [{"role": "user", "content": prompt(number)}]
                    answer = await client.chat.completions.create(
                        model=MODEL, messages=messages, temperature=0.0, max_tokens=1024, seed=0
                    )
                    answers.append(answer.choices[0].message.content)

            await asyncio.gather(*(work() for _ in range(concurrency)))
        return answers

    return {**measured(lambda: asyncio.run(loop())), "around": 0.0}


CLIENTS = {"ours": ours, "openai": plain_openai}


def forget_peak() -> None:
    """Count the peak of memory from here on: `datasets` has read the file, by at most 10 MB at once."""
    STATUS.with_name("clear_refs").write_text("5")


def measured(function) -> dict:
    begin, processor = time.perf_counter(), time.process_time()
    function()
    return {"seconds": time.perf_counter() - begin, "processor": time.process_time() - processor}


def child(client: str, url: str, concurrency: str, rows: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        figures = CLIENTS[client](url, int(concurrency), int(rows), Path(folder))
    peak = int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) / 1024
    print(json.dumps({**figures, "peak": peak}))


def run(client: str, url: str, concurrency: int, rows: int) -> dict:
    command = [sys.executable, __file__, "--child", client, url, str(concurrency), str(rows)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    print(f"Load at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    table = []
    for concurrency in arguments.concurrency:
        ideal = concurrency / LATENCY
        requests = int(ideal * arguments.seconds)
        for client in arguments.clients:
            with server(LATENCY) as url:
                figures = run(client, url, concurrency, requests)
            rate = requests / figures["seconds"]
            each = 1000 * figures["processor"] / requests
            table.append([client, concurrency, f"{rate:,.0f}", f"{ideal:,.0f}", f"{rate / ideal:.0%}", f"{each:.2f}"])
            print(table[-1], flush=True, file=sys.stderr)
    print(markdown(["client", "in flight", "answers/s", "ideal", "share", "processor ms a request"], table), "\n")
    table = []
    for rows in arguments.rows:
        for client in arguments.clients:
            with server(0.0) as url:
                figures = run(client, url, 64, rows)
            around = 1000 * figures["around"] / rows
            row = [client, f"{rows:,}", f"{figures['peak']:.0f}", f"{1000 * figures['processor'] / rows:.2f}"]
            table.append([*row, f"{around:.2f}", f"{figures['seconds']:.0f}"])
            print(table[-1], flush=True, file=sys.stderr)
    head = ["client", "prompts", "peak MiB", "processor ms a request", "reading and set, ms a row", "seconds"]
    print(markdown(head, table))


if __name__ == "__main__":
    main()
