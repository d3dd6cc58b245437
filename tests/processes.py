"""
Functions in processes of their own: alone, killed at a moment, or together as one distributed run.

They are forked from a server that has imported what each would take ten seconds to import. Every one is a process like any other:
it can be killed, and its `torch.distributed` is the real one. Tests of a way in (`torchrun`, `accelerate launch`, `trl-bbkd`) start
that command instead.
"""

import functools
import gc
import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = [
    "matplotlib.figure",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "trl_bbkd.llkd.job",
    "trl_bbkd.runs.run",
    "trl_bbkd.runs.text_job",
]


class Moment(NamedTuple):
    """Before (or after) the given call of the function at a path, of those calls that count."""

    path: str
    call: int = 1
    counts: Callable[..., bool] | None = None
    after: bool = False

    def kill_then(self) -> None:
        function, numbers = pkgutil.resolve_name(self.path), itertools.count(1)

        @functools.wraps(function)
        def killing(*args, **kwargs):
            is_then = (self.counts is None or self.counts(*args, **kwargs)) and next(numbers) == self.call
            if is_then:
                if self.after:
                    function(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        pytest.MonkeyPatch().setattr(self.path, killing)


def killed_at(moment: Moment | str, function: Callable, *arguments, processes: int = 1, **keywords) -> None:
    """Call a function in a process that kills itself with SIGKILL at the moment, or in several of which each does."""
    moment = moment if isinstance(moment, Moment) else Moment(moment)
    ended = _run(_ranks(processes), moment, functools.partial(function, *arguments, **keywords))
    assert _were_killed(ended), "\n".join(f"exit status {code}\n{printed}" for code, printed, _ in ended)


def on_processes(count: int, function: Callable, *arguments, **keywords) -> list[Any]:
    """What a function returns on each process of a distributed run, or on one alone."""
    return _results(_run(_ranks(count), None, functools.partial(function, *arguments, **keywords)))


def killed_until_it_ends(
    count: int, moment: Moment | str, function: Callable, *arguments, **keywords
) -> tuple[list[Any], int]:
    """
    Call a function on processes that kill themselves at the moment, and again, until it comes to its end before. Returns what
    it then returns on each process, and how often it was killed.
    """
    moment = moment if isinstance(moment, Moment) else Moment(moment)
    for kills in itertools.count():
        ended = _run(_ranks(count), moment, functools.partial(function, *arguments, **keywords))
        if not _were_killed(ended):
            return _results(ended), kills
        assert kills < 100, "it never comes to its end"
    raise AssertionError


def _were_killed(ended: list[tuple[int, str, Any]]) -> bool:
    """Whether one process was. The others may end in an exchange with it first."""
    return any(code == -signal.SIGKILL for code, *_ in ended)


def _ranks(count: int) -> list[dict]:
    """The environment of each process of a distributed run, or of one alone."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)] if count > 1 else [{}]


def _results(ended: list[tuple[int, str, Any]]) -> list[Any]:
    failed = [
        f"process {rank}: exit status {code}\n{printed}" for rank, (code, printed, _) in enumerate(ended) if code
    ]
    assert not failed, "\n".join(failed)
    return [result for _, _, result in ended]


def train(make_trainer: Callable, *arguments, **keywords) -> None:
    make_trainer(*arguments, **keywords).train()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _run(environments: list[dict], moment: Moment | None, function: Callable) -> list[tuple[int, str, Any]]:
    """Of each process: its exit status, the end of what it printed, and what the function returned."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        FORKS.set_forkserver_preload(IMPORTED)
        files = [Path(folder, str(rank)) for rank in range(len(environments))]
        processes = []
        for file, environment in zip(files, environments, strict=True):
            environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
            processes.append(FORKS.Process(target=_call, args=(file, environment, moment, function)))
            processes[-1].start()
        _wait_for(processes)
        return [
            (
                process.exitcode,
                # One that ended for another's sake may not have begun
                file.with_suffix(".log").read_text()[-3000:] if file.with_suffix(".log").exists() else "",
                torch.load(file) if file.exists() else None,
            )
            for process, file in zip(processes, files, strict=True)
        ]


def _wait_for(processes: list, timeout: float = 300) -> None:
    """One that fails ends the others, which would wait for it."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        wait([process.sentinel for process in processes if process.is_alive()], end - time.monotonic())
        if any(process.exitcode for process in processes):
            break
    for process in processes:
        process.terminate()
        process.join()


def _call(file: Path, environment: dict[str, str], moment: Moment | None, function: Callable) -> None:
    gc.freeze()  # as in `conftest.py`
    os.environ.clear()
    os.environ.update(environment)
    with open(file.with_suffix(".log"), "wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    if moment is not None:
        moment.kill_then()
    torch.save(function(), file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
