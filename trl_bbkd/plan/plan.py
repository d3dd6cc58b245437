"""From a recipe to a plan: what each engine and each way takes, what fits, what to change if nothing does, and the time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import BitsAndBytesConfig

from ..host.sharding import why_not_sharded
from ..runs.held_models import Phase
from ..runs.methods import load_method
from ..runs.recipe import Recipe
from ..runs.sampling_plan import EVALUATION_PROMPTS, SamplingPlan, answers_in_training, sampling_plan
from ..soft_targets.store import bytes_per_token
from .cost import Part, evaluation_seconds, parts_of
from .footprint import Footprint, footprint
from .memory import (
    DEVICES_OF_A_MACHINE,
    ENGINES,
    ENGINES_OF_MACHINES,
    GIB,
    EngineName,
    ModelSize,
    Setting,
)
from .models import ModelSizes, with_saved_adapter
from .reading import count_rows, phases_of, rows_of_a_step, steps_of
from .ways import Way, in_a_way, options, way_of, ways_for


MOST_DEVICES = 1024


@dataclass
class Machine:
    """
    What a run is planned for.

    Args:
        gpus (`int`):
            How many.
        gpu_memory (`float`):
            GiB of one.
        tflops (`float`), utilization (`float`):
            What one computes in a second at most, in units of 10¹² operations, and the share that a run reaches.
    """

    gpus: int
    gpu_memory: float
    tflops: float
    utilization: float

    @property
    def bytes(self) -> int:
        return int(self.gpu_memory * GIB)

    @property
    def flops(self) -> float:
        return self.tflops * 1e12 * self.utilization


@dataclass
class Case:
    """
    One way under one engine.

    Args:
        refusal (`str`):
            Why the engine cannot do it, in one line; empty if it can.
        phases (`list[Phase]`), footprints (`list[Footprint]`):
            With the batch of the recipe.
        largest_batch (`int`):
            Largest `per_device_train_batch_size`, by doubling, that fits; 0 if none does.
        fits (`bool`):
            Whether the recipe's does.
    """

    engine: EngineName
    way: Way | None
    refusal: str = ""
    phases: list[Phase] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    largest_batch: int = 0
    fits: bool = False

    @property
    def total(self) -> float:
        return max(found.total for found in self.footprints)

    @property
    def largest(self) -> int:
        """Place of the phase that takes most."""
        return max(range(len(self.footprints)), key=lambda place: self.footprints[place].total)


@dataclass
class Change:
    """Something that makes a recipe fit: what to do, the engine under which it then does, and the batch."""

    text: str
    engine: EngineName
    batch: int
    total: float


@dataclass
class RunTime:
    """
    The whole run.

    Args:
        steps (`int`):
            Optimizer steps.
        training (`float`), evaluation (`float`):
            Seconds.
        plan ([`~runs.text_job.SamplingPlan`]):
            The report's sampling.
        samples (`int`):
            Completions that training samples.
    """

    steps: int
    training: float
    evaluation: float
    plan: SamplingPlan | None
    samples: int


class Plan:
    """
    Args:
        recipe ([`~runs.recipe.Recipe`]):
            As [`~reading.read_recipe`] read it.
        machine ([`Machine`]):
            What it is planned for.
        rows (`int`, *optional*):
            Training rows. `None` counts those of a file of JSON lines.
    """

    def __init__(self, recipe: Recipe, machine: Machine, rows: int | None = None):
        self.recipe, self.machine = recipe, machine
        self.rows = rows if rows is not None else count_rows(recipe)
        self._measure = ModelSizes(bool(getattr(recipe.training_args, "trust_remote_code", False)))
        self._phases: dict[int | None, list[Phase]] = {}
        own = self.phases()
        self.way = way_of(own)
        self.engines = engines_on(machine.gpus)
        self.own = {engine: self.case(engine) for engine in self.engines}
        self.others = {
            way.name: {engine: self.case(engine, way) for engine in self.engines}
            for way in ways_for(own)
            if way != self.way
        }
        self.recommended = next((case for case in self.own.values() if case.fits), None) or next(
            (case for case in self.own.values() if case.largest_batch), None
        )
        self.changes = [] if self.recommended else self._changes()

    def phases(self, batch: int | None = None) -> list[Phase]:
        """The run's phases, at the recipe's batch or another."""
        if batch not in self._phases:
            found = phases_of(self.recipe, batch)
            models = lambda phase: tuple(map(with_saved_adapter, phase.models))  # noqa: E731
            self._phases[batch] = [replace(phase, models=models(phase)) for phase in found]
        return self._phases[batch]

    def sizes(self, phase: Phase) -> Mapping[str, ModelSize]:
        return {model.name: self._measure(model) for model in phase.models}

    def setting(self, engine: EngineName, gpus: int | None = None) -> Setting:
        args = self.recipe.training_args
        compute = 2 if args.bf16 or args.fp16 else 4
        gpus = gpus or self.machine.gpus
        return Setting(engine, gpus, self.machine.bytes, compute, bool(args.gradient_checkpointing))

    def case(self, engine: EngineName, way: Way | None = None, gpus: int | None = None, change=None) -> Case:
        """
        Args:
            engine (`str`):
                The engine.
            way ([`~ways.Way`], *optional*):
                Another way than the recipe's.
            gpus (`int`, *optional*):
                Another number of GPUs.
            change (`Callable`, *optional*):
                What else is changed, of each phase.
        """
        setting = self.setting(engine, gpus)

        def at(batch: int | None) -> tuple[list[Phase], list[Footprint]]:
            phases = self.phases(batch) if way is None else in_a_way(self.phases(batch), way)
            phases = [change(phase) for phase in phases] if change else phases
            return phases, [footprint(phase, self.sizes(phase), setting) for phase in phases]

        phases, footprints = at(None)
        found = Case(engine, way, phases=phases, footprints=footprints)
        found.refusal = self._refusal(phases, engine)
        if not found.refusal:
            found.fits = found.total <= self.machine.bytes
            batch = 1
            while batch <= rows_of_a_step(self.recipe):
                if max(each.total for each in at(batch)[1]) > self.machine.bytes:
                    break
                found.largest_batch, batch = batch, 2 * batch
        return found

    def _refusal(self, phases: list[Phase], engine: EngineName) -> str:
        """What a run would be refused with under an engine: the runs' own words."""
        if engine == "ddp":
            return ""
        quantization = [
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=model.storage_of_4bit)
            for phase in phases
            for model in phase.models
            if model.is_4bit and not model.is_whole
        ]
        return why_not_sharded(engine, *quantization) or load_method(self.recipe.method).why_not_sharded(self.recipe)

    def _changes(self) -> list[Change]:
        """What makes a recipe fit that does not, the nearest first: sampling, then the way, then more GPUs."""
        found = []
        own = self.phases()
        colocated = any(phase.vllm_share for phase in own)
        if colocated and not all(phase.vllm_sleeps for phase in own):
            sleeps = lambda phase: replace(phase, vllm_sleeps=True)  # noqa: E731
            found.append(self._change("--vllm_enable_sleep_mode true", change=sleeps))
        if colocated or any(phase.sampled and not phase.uses_vllm for phase in own):
            served = lambda phase: replace(phase, uses_vllm=bool(phase.sampled), vllm_share=0.0)  # noqa: E731
            found.append(self._change("--use_vllm true --vllm_mode server, on GPUs of its own", change=served))
        for way in ways_for(own):
            said = options(own, way)
            if way != self.way and way.is_adapter and said:
                found.append(self._change(said, way=way))
        gpus = 2 * self.machine.gpus
        while gpus <= MOST_DEVICES and not (more := self._change(f"--gpus {gpus}", gpus=gpus)):
            gpus *= 2
        return [change for change in [*found, more if gpus <= MOST_DEVICES else None] if change]

    def _change(self, text: str, **how) -> Change | None:
        for engine in engines_on(how.get("gpus", self.machine.gpus)):
            case = self.case(engine, **how)
            if case.largest_batch:
                return Change(text, engine, case.largest_batch, case.total)
        return None

    # Time

    def parts(self, case: Case) -> list[tuple[Phase, list[Part]]]:
        """The parts of a step of each phase."""
        setting = self.setting(case.engine)
        return [(phase, parts_of(phase, self.sizes(phase), setting, self.machine.flops)) for phase in case.phases]

    def run_time(self, case: Case) -> RunTime | None:
        """The student's training and the report's sampling; `None` if the number of steps is not known."""
        steps = steps_of(self.recipe, self.rows, self.machine.gpus)
        phase, parts = self.parts(case)[-1]
        if steps is None or phase.name != "the student's training":
            return None
        student = phase.models[0]
        script_args = self.recipe.script_args
        plan, evaluation = None, 0.0
        if hasattr(script_args, "eval_prompts"):
            most = script_args.eval_prompts or EVALUATION_PROMPTS
            held_out = most if self.rows is None else min(most, max(1, self.rows // 20))
            args = self.recipe.training_args
            learned = steps * rows_of_a_step(self.recipe) * self.machine.gpus
            answers = answers_in_training(load_method(self.recipe.method).samples_per_prompt(args), learned)
            plan = sampling_plan(script_args, steps, held_out, script_args.seqkd_baseline, answers)
            batches = -(-plan.all // (self.machine.gpus * args.per_device_eval_batch_size))
            tokens = batches * args.max_completion_length
            evaluation = evaluation_seconds(student, self._measure(student), self.setting(case.engine), tokens)
        samples = steps * phase.step_rows * self.machine.gpus if phase.sampled else 0
        return RunTime(steps, steps * sum(part.took for part in parts), evaluation, plan, samples)

    @property
    def store_bytes(self) -> int:
        """Bytes of the soft targets on disk, if every answer were as long as the longest; 0 if there are none."""
        tokens = max((phase.targets_per_token for phase in self.phases()), default=0)
        if not tokens or not self.rows:
            return 0
        return self.rows * self.recipe.training_args.max_completion_length * bytes_per_token(tokens)


def engines_on(gpus: int) -> tuple[EngineName, ...]:
    """The engines that are planned for, the cheapest first."""
    if gpus == 1:
        return ENGINES[:1]
    return ENGINES if gpus <= DEVICES_OF_A_MACHINE or gpus % DEVICES_OF_A_MACHINE else ENGINES_OF_MACHINES
