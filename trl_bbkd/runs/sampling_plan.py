"""How much a report samples: as the recipe says, or in proportion to the training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.student import TEMPERATURES
from ..seqkd.trainer import curve_steps
from .recipe import RecipeArguments


# Most and fewest that a report takes by itself, and its share of the training's cost, as far as those allow
EVALUATION_PROMPTS, EVALUATION_SAMPLES, FEWEST_PROMPTS = 256, 8, 16
EVALUATION_SHARE = 0.1
# Tokens that are learned from in the time of one that is sampled: 1.3 (135 M parameters) to 5.4 (0.26 M) on a CPU, at batch 8
COST_OF_SAMPLING = 2


@dataclass
class SamplingPlan:
    """
    How much the report samples.

    Args:
        prompts (`int`):
            Held-out prompts.
        samples (`int`):
            Samples of each at every temperature but 0, of which there is one.
        curve_samples (`int`):
            Samples of each along the way, at the first temperature.
        students (`int`):
            Students measured as they end, the undistilled one included.
        curves (`int`):
            Measurements along the way.
        temperatures (`Sequence[float]`):
            Temperatures.
        answers (`float`, *optional*):
            How many answers could be sampled in the time of the training.
        own_answers (`float`, *optional*, defaults to `0.0`):
            Answers that the training samples itself. How long it learns from one is not known before: on a CPU, 2.4 (Proxy-KD on
            policy), 5 (PreferenceKD) and 5.7 (GAD) only sampled ones took as long in tinycount, 4 with 135 M parameters (GAD).
    """

    prompts: int
    samples: int
    curve_samples: int
    students: int
    curves: int
    temperatures: Sequence[float] = TEMPERATURES
    answers: float | None = None
    own_answers: float = 0.0

    @property
    def once(self) -> int:
        """Completions of one student's measurement."""
        return self.prompts * sum(self.samples if temperature > 0 else 1 for temperature in self.temperatures)

    @property
    def all(self) -> int:
        """Completions of the run."""
        return self.students * self.once + self.curves * self.prompts * self.curve_samples

    def __str__(self) -> str:
        named = ", ".join(f"{temperature:g}" for temperature in self.temperatures)
        text = (
            f"report: {self.prompts} held-out prompts (eval_prompts), {self.samples} sample{'s' * (self.samples > 1)} of each "
            f"(eval_samples; one when greedy) at temperatures {named} (eval_temperatures): {self.once:,} completions now, "
            f"{self.all:,} in the whole run"
        )
        if self.own_answers:
            return (
                f"{text}, {self.all / self.own_answers:.2g} for each answer that the training samples and learns from"
            )
        return text + (f", about {self.all / self.answers:.0%} of the training's cost" if self.answers else "")


def answers_in_training(samples_per_prompt: int, rows: int) -> float:
    """
    How many answers could be sampled in the time of a training, by counts alone: a run and its repetition plan alike.

    Args:
        samples_per_prompt (`int`):
            The method's sequences for each prompt; where there are several, it samples them itself.
        rows (`int`):
            Sequences that are learned from.
    """
    return rows if samples_per_prompt > 1 else rows / COST_OF_SAMPLING


def sampling_plan(
    script_args: RecipeArguments,
    steps: int,
    rows: int,
    has_baseline: bool,
    answers: float | None = None,
    own_answers: float = 0.0,
) -> SamplingPlan:
    """
    What the recipe says of the report's sampling. What it leaves open suits the training's length, and is then made smaller,
    samples before prompts, until the report takes a tenth of the training, or has one sample of 16 prompts.

    Args:
        script_args ([`~runs.recipe.RecipeArguments`]):
            `eval_prompts`, `eval_samples` and `eval_temperatures`.
        steps (`int`):
            Optimizer steps of the training.
        rows (`int`):
            Held-out rows.
        has_baseline (`bool`):
            Whether SeqKD is trained.
        answers (`float`, *optional*):
            As of [`answers_in_training`]; `None` makes nothing smaller.
        own_answers (`float`, *optional*, defaults to `0.0`):
            Answers that the training samples itself.
    """
    points = len(curve_steps(steps))

    def plan(prompts: int, samples: int) -> SamplingPlan:
        return SamplingPlan(
            prompts=min(script_args.eval_prompts or prompts, rows),
            samples=script_args.eval_samples or samples,
            curve_samples=math.ceil((script_args.eval_samples or samples) / 2),
            students=3 if has_baseline else 2,
            # The method's last one is its final measurement
            curves=points - 1 + (points if has_baseline else 0),
            temperatures=script_args.eval_temperatures or TEMPERATURES,
            answers=answers,
            own_answers=own_answers,
        )

    prompts = min(max(steps, FEWEST_PROMPTS), EVALUATION_PROMPTS)
    samples = min(max(steps // 30, 1), EVALUATION_SAMPLES)
    most = math.inf if answers is None else EVALUATION_SHARE * answers
    while samples > 1 and plan(prompts, samples).all > most:
        samples -= 1
    found = plan(prompts, samples)
    if found.all > most:
        found = plan(max(FEWEST_PROMPTS, int(most / (found.all / found.prompts))), samples)
    return found
