"""A run's report in the experiment trackers that its recipe names, in the very runs that they keep of its training."""

import contextlib
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..reports.markdown import escape, table
from ..reports.report import Report
from ..reports.text_report import OWN_METRICS
from ..reports.tracked import completions_table, report_scalars, report_tables
from ..seqkd.trainer import CURVE_PREFIX, curve
from .progress import Progress


logger = logging.getLogger(__name__)

TRACKER_RUNS, IN_TRACKERS = "tracker runs", "report in trackers"
PROMPTS_ALONG_THE_WAY = 4


@dataclass
class ModelFacts:
    """What a tracker's callback asks a model for, without its weights."""

    config: Any
    peft_config: Any
    parameters: int

    def num_parameters(self) -> int:
        return self.parameters


class Tracker:
    """
    The run that a tracker keeps of a training.

    Args:
        callback ([`~transformers.TrainerCallback`]):
            The training's callback for it.
        args ([`~transformers.TrainingArguments`]):
            The training's arguments.
        model (`ModelFacts`):
            Its model, for the tracker's configuration.
    """

    name: str
    library: Any  # has `log` and `Table`

    def __init__(self, callback, args, model: ModelFacts):
        self.callback, self.args, self.model = callback, args, model

    def run(self) -> Any:
        """What finds the run again, in another process too. It is open."""
        raise NotImplementedError

    def go_on(self, run: Any) -> None:
        """Have the callback take a run of an earlier process."""
        raise NotImplementedError

    def open(self, state: TrainerState) -> None:
        """After the training."""
        self.callback.on_train_begin(self.args, state, TrainerControl(), model=self.model)

    def log(self, step: int, scalars: dict[str, float], tables: dict[str, list[dict]]) -> None:
        shown = {
            name: self.library.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            for name, rows in tables.items()
        }
        self.library.log({**scalars, **shown, "train/global_step": step})

    def close(self, state: TrainerState) -> None:
        raise NotImplementedError


class Trackio(Tracker):
    """The callback closes the run when a training ends, and finds it by its name."""

    name = "trackio"

    def __init__(self, callback, args, model: ModelFacts):
        super().__init__(callback, args, model)
        self.library = importlib.import_module("trackio")

    def run(self) -> str:
        # Without a name each part of a training in several would have a run of its own
        self.args.run_name = self.library.context_vars.current_run.get().name
        return self.args.run_name

    def go_on(self, run: str) -> None:
        self.args.run_name = self.args.run_name or run

    def close(self, state: TrainerState) -> None:
        # With a Space, the callback renews its snapshot too
        self.callback.on_train_end(self.args, state, TrainerControl(), model=self.model)


class Wandb(Tracker):
    """The callback leaves the run open, and takes one that is."""

    name = "wandb"

    def __init__(self, callback, args, model: ModelFacts):
        super().__init__(callback, args, model)
        self.library = importlib.import_module("wandb")

    def run(self) -> dict[str, str]:
        return {name: getattr(self.library.run, name) for name in ("entity", "project", "id")}

    def go_on(self, run: dict[str, str]) -> None:
        if self.library.run is None:
            self.library.init(**run, resume="allow")

    def close(self, state: TrainerState) -> None:
        self.library.finish()


class TensorBoard(Tracker):
    """A run is a folder. There is text, and no tables."""

    name = "tensorboard"

    def run(self) -> str:
        return self.callback.logging_dir

    def go_on(self, run: str) -> None:
        self.callback.logging_dir = self.callback.logging_dir or run

    def open(self, state: TrainerState) -> None:
        # When a training begins the callback writes all arguments, which are there
        self.callback.on_log(self.args, state, TrainerControl(), logs={})

    def log(self, step: int, scalars: dict[str, float], tables: dict[str, list[dict]]) -> None:
        writer = self.callback.tb_writer
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        for name, rows in tables.items():
            cells = [["–" if value is None else escape(value) for value in row.values()] for row in rows]
            writer.add_text(name, "\n".join(table(list(map(escape, rows[0])), cells)), step)

    def close(self, state: TrainerState) -> None:
        self.callback.on_train_end(self.args, state, TrainerControl())


TRACKERS = {TrackioCallback: Trackio, WandbCallback: Wandb, TensorBoardCallback: TensorBoard}


class Trackers(TrainerCallback):
    """
    Sends what is measured on held-out prompts along the way, and the report at the end, to the trackers of a training.

    Which runs of theirs those are is part of the progress: a resumed training goes on in them, and a finished one that is resumed
    sends nothing twice. A tracker that fails costs a warning.

    Args:
        trainer ([`~transformers.Trainer`]):
            The student's trainer.
        progress (`Progress`):
            Of the run.
        answers (`Callable[[], list[dict]]`):
            What the student answered when it was last measured, as of [`~reports.held_out.prompt_lines`].
    """

    def __init__(self, trainer, progress: Progress, answers: Callable[[], list[dict]] = list):
        self.progress, self.answers = progress, answers
        model = trainer.model
        # Neither trainer nor model: they are gone when the report is sent
        facts = ModelFacts(model.config, getattr(model, "peft_config", None), model.num_parameters())
        self.trackers = [
            TRACKERS[type(callback)](callback, trainer.args, facts)
            for callback in trainer.callback_handler.callbacks
            if type(callback) in TRACKERS
        ]
        trainer.add_callback(self)

    def go_on(self) -> None:
        """Before a training or the report, on the main process, in the runs of an earlier process."""
        if not PartialState().is_main_process:
            return
        runs = self.progress[TRACKER_RUNS] if TRACKER_RUNS in self.progress else {}
        for tracker in self.trackers:
            if tracker.name in runs:
                with told(tracker.name, "the run"):
                    tracker.go_on(runs[tracker.name])

    def on_train_begin(self, args, state, control, **kwargs):
        if not (state.is_world_process_zero and self.trackers):
            return
        runs = {}
        for tracker in self.trackers:
            with told(tracker.name, "the name of its run"):
                runs[tracker.name] = tracker.run()
        self.progress.finish(TRACKER_RUNS, runs)

    def on_step_end(self, args, state, control, **kwargs):
        points = curve(state.log_history[-1:])
        if not (
            self.trackers and state.is_world_process_zero and points and points[0].pop("step") == state.global_step
        ):
            return
        scalars = {CURVE_PREFIX + name: value for name, value in points[0].items()}
        judged_or_nll = next(name for name in points[0] if name.partition("@")[0] not in OWN_METRICS)
        rows = completions_table(self.answers()[:PROMPTS_ALONG_THE_WAY], judged_or_nll)
        tables = {CURVE_PREFIX + "completions": rows} if rows else {}
        for tracker in self.trackers:
            with told(tracker.name, f"what was measured at step {state.global_step}"):
                tracker.log(state.global_step, scalars, tables)

    def send(self, report: Report, answers: list[dict], step: int) -> None:
        """
        Send a report, on the main process.

        Args:
            report ([`~reports.report.Report`]):
                The report.
            answers (`list[dict]`):
                What its students said to held-out prompts.
            step (`int`):
                The last optimizer step.
        """
        sent = list(self.progress[IN_TRACKERS]) if IN_TRACKERS in self.progress else []
        trackers = [tracker for tracker in self.trackers if tracker.name not in sent]
        if not trackers:
            return
        scalars, tables = report_scalars(report), report_tables(report, answers)
        state = TrainerState(global_step=step)
        self.go_on()
        for tracker in trackers:
            with told(tracker.name, "the report"):
                tracker.open(state)
                tracker.log(step, scalars, tables)
                tracker.close(state)
                sent.append(tracker.name)
                self.progress.finish(IN_TRACKERS, sent)


@contextlib.contextmanager
def told(tracker: str, what: str):
    """Go on without a tracker that fails: what it was to be told is on disk."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{tracker} did not take {what} ({type(error).__name__}: {error}). It is in output_dir too.")
