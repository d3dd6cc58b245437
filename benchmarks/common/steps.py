"""How long a training step takes."""

import statistics
import time
from collections.abc import Callable

from transformers import TrainerCallback

from .device import HAS_GPU, synchronize


# On a CPU, the process's own time: another program running beside does not change it
clock = time.perf_counter if HAS_GPU else time.process_time


class StepTimes(TrainerCallback):
    """Seconds of each step: with loading, from the end of the step before; without, from its own begin."""

    def __init__(self, warmup_steps: int, with_loading: bool = True):
        self.warmup_steps, self.with_loading = warmup_steps, with_loading
        self.started, self.seconds = None, []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.started is None or not self.with_loading:
            self.started = clock()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        ended = clock()
        self.seconds.append(ended - self.started)
        self.started = ended

    def median(self) -> float:
        return statistics.median(self.seconds[self.warmup_steps :])


def fastest(rounds: int, variants: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Variants take turns, and the fastest round of each counts."""
    best = {}
    for _ in range(rounds):
        for name, measure in variants.items():
            seconds = measure()
            best[name] = min(seconds, best.get(name, seconds))
    return best
