"""What goes wrong in adversarial distillation, how a run shows it, and what to do: told once each, while it happens."""

from collections import Counter, deque
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


# Thresholds are ours, read off the pitfalls of arXiv 2511.10643 and its independent replication: see docs/gad.md
WINDOW = 5  # generation batches that are averaged before judging
FIRST_BATCHES = 20  # a tell shows itself early; later, high accuracy is saturation
MAX_ACCURACY = 0.98
MAX_LOSS_WHEN_SATURATED = 0.06  # a pair's gradient is then 1 - exp(-0.06), 12 % of what it is at log 2
MIN_ACCURACY = 0.5
TELL_ACCURACY = 0.99
TELL_SHARE = 0.5
MIN_TEACHER_ANSWERS = 16  # of fewer, some token is always more frequent on one side by chance
MAX_LENGTH_RATIO = 1.5
MIN_REMAINING_GROUP_STD = 0.1
MIN_REMAINING_ENTROPY = 0.25
MAX_HELD_OUT_GAP = 0.2
TOLD_POSITIONS = 8


@dataclass(frozen=True)
class TrainingWarning:
    """
    One thing that went wrong.

    Parameters:
        kind (`str`):
            `"saturated"`, `"inverted"`, `"memorised"`, `"tell"`, `"length"`, `"group_std"` or `"entropy"`.
        step (`int`):
            Optimizer step at which it was noticed.
        text (`str`):
            What was seen, and the remedy.
    """

    kind: str
    step: int
    text: str


@dataclass(frozen=True)
class Tell:
    """
    The token that most gives one side away.

    Parameters:
        position (`int`):
            Where: `0` is the first token of an answer, `-1` the last.
        token (`int`):
            The token's id.
        teacher_share (`float`), student_share (`float`):
            Share of each side's answers with this token there.
    """

    position: int
    token: int
    teacher_share: float
    student_share: float

    @property
    def difference(self) -> float:
        return abs(self.teacher_share - self.student_share)

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """In words, such as: token `'</s>'` is the last of 100 % of the teacher's answers and of 0 % of the student's."""
        place = f"number {self.position + 1}" if self.position >= 0 else f"number {-self.position} from the end"
        place = {0: "the first", -1: "the last"}.get(self.position, place)
        return (
            f"token {tokenizer.decode([self.token])!r} (id {self.token}) is {place} of {self.teacher_share:.0%} of the "
            f"teacher's answers and of {self.student_share:.0%} of the student's"
        )


def find_tell(teacher_ids: list[list[int]], student_ids: list[list[int]]) -> Tell:
    """
    Find the token and position, among the first and last eight, whose frequency differs most between the two sides.

    Args:
        teacher_ids (`list[list[int]]`), student_ids (`list[list[int]]`):
            Answers of both sides, as token ids.
    """
    tells = []
    for position in [*range(TOLD_POSITIONS), *range(-TOLD_POSITIONS, 0)]:
        counts = []
        for answers in (teacher_ids, student_ids):
            present = [ids[position] for ids in answers if len(ids) > (position if position >= 0 else -position - 1)]
            counts.append(Counter(present))
        for token in counts[0] | counts[1]:
            shares = counts[0][token] / len(teacher_ids), counts[1][token] / len(student_ids)
            tells.append(Tell(position, token, *shares))
    return max(tells, key=lambda tell: tell.difference)


def _edges(ids: list[int]) -> list[int]:
    """What [`find_tell`] looks at of an answer."""
    return list(ids) if len(ids) <= 2 * TOLD_POSITIONS else [*ids[:TOLD_POSITIONS], *ids[-TOLD_POSITIONS:]]


class TrainingMonitor:
    """
    Watches a run's metrics and words a warning the first time each kind of trouble shows.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Spells out tells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.warnings: list[TrainingWarning] = []
        self.num_batches = 0
        self.adversarial: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.at_start: dict[str, float] = {}
        self.answers: list[list[list[list[int]]]] = []  # of batches too small to be searched alone, [teacher, student]
        self.entropy: float | None = None  # of the student's latest loss
        self.best_held_out: float | None = None  # of the discriminator's accuracies on held-out rows
        self.evaluations_since_best = 0

    def state(self) -> dict:
        """What a resumed run needs, ready for JSON."""
        return {
            "warnings": [vars(warning) for warning in self.warnings],
            "num_batches": self.num_batches,
            "adversarial": list(self.adversarial),
            "at_start": self.at_start,
            "answers": self.answers,
            "entropy": self.entropy,
            "best_held_out": self.best_held_out,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def load_state(self, state: dict) -> None:
        """Restore [`~TrainingMonitor.state`]."""
        self.warnings = [TrainingWarning(**warning) for warning in state["warnings"]]
        self.num_batches = state["num_batches"]
        self.adversarial = deque(state["adversarial"], maxlen=WINDOW)
        self.at_start = state["at_start"]
        self.answers = state["answers"]
        self.entropy = state["entropy"]
        self.best_held_out = state["best_held_out"]
        self.evaluations_since_best = state["evaluations_since_best"]

    def observe(
        self,
        step: int,
        metrics: dict[str, float],
        in_warmup: bool,
        teacher_ids: list[list[int]],
        student_ids: list[list[int]],
    ) -> list[TrainingWarning]:
        """
        Take in one generation batch.

        Args:
            step (`int`):
                Optimizer step.
            metrics (`dict[str, float]`):
                `discriminator/accuracy`, `/loss` and `/group_std`, `completions/length_ratio`, and `entropy` once known.
            in_warmup (`bool`):
                Only tells are looked for during warm-up.
            teacher_ids (`list[list[int]]`), student_ids (`list[list[int]]`):
                The batch's answers.

        Returns:
            `list[TrainingWarning]`: What is new.
        """
        self.num_batches += 1
        found = {}
        if self.num_batches <= FIRST_BATCHES:
            tell = self._look_for_tell(teacher_ids, student_ids)
            if tell is not None and metrics["discriminator/accuracy"] >= TELL_ACCURACY:
                found["tell"] = (
                    f"the discriminator separates the two sides almost perfectly (accuracy "
                    f"{metrics['discriminator/accuracy']:.2f} in generation batch {self.num_batches}), and "
                    f"{tell.describe(self.tokenizer)}. It may reward only that. Make both sides alike in the data "
                    "(end of sequence, spaces, wrappers, truncation at max_completion_length) unless the student "
                    "should learn just that."
                )
        if not in_warmup:
            self.adversarial.append(metrics)
            if len(self.adversarial) == WINDOW:
                found |= self._judge_adversarial()
        return self._tell(step, found)

    def observe_held_out(self, step: int, accuracy: float) -> list[TrainingWarning]:
        """
        Take in the discriminator's accuracy on held-out rows, of one evaluation.

        Args:
            step (`int`):
                Optimizer step.
            accuracy (`float`):
                Share of pairs in which the teacher's answer scores higher.

        Returns:
            `list[TrainingWarning]`: What is new.
        """
        self.evaluations_since_best += 1
        if self.best_held_out is None or accuracy > self.best_held_out:
            self.best_held_out, self.evaluations_since_best = accuracy, 0
        trained = self._mean("discriminator/accuracy")
        found = {}
        if len(self.adversarial) == WINDOW and trained - accuracy > MAX_HELD_OUT_GAP:
            found["memorised"] = (
                f"the discriminator knows the teacher's training answers by heart (accuracy {trained:.2f} on training prompts, "
                f"{accuracy:.2f} on held-out ones): its reward says little of other text. Start it from a checkpoint that has not "
                "been trained on these answers, keep answers back from the warm-up (discriminator_rows='unseen'), stop it when it gets no "
                "better there (discriminator_patience), or give it more rows."
            )
        return self._tell(step, found)

    def _tell(self, step: int, found: dict[str, str]) -> list[TrainingWarning]:
        """What has not been told yet of what was found, by kind."""
        told = {warning.kind for warning in self.warnings}
        new = [TrainingWarning(kind, step, text) for kind, text in found.items() if kind not in told]
        self.warnings += new
        return new

    def _look_for_tell(self, teacher_ids: list[list[int]], student_ids: list[list[int]]) -> Tell | None:
        """A tell in this batch, together with those before it if it alone has too few answers."""
        self.answers.append([[_edges(ids) for ids in side] for side in (teacher_ids, student_ids)])
        teacher, student = ([ids for batch in self.answers for ids in batch[side]] for side in (0, 1))
        while sum(len(batch[0]) for batch in self.answers) >= MIN_TEACHER_ANSWERS:
            self.answers.pop(0)
        if self.num_batches == FIRST_BATCHES:
            self.answers = []
        if len(teacher) < MIN_TEACHER_ANSWERS:
            return None
        tell = find_tell(teacher, student)
        return tell if tell.difference >= TELL_SHARE else None

    def _mean(self, name: str) -> float | None:
        values = [metrics[name] for metrics in self.adversarial if name in metrics]
        return sum(values) / len(values) if values else None

    def _judge_adversarial(self) -> dict[str, str]:
        found = {}
        accuracy, loss = self._mean("discriminator/accuracy"), self._mean("discriminator/loss")
        if accuracy > MAX_ACCURACY and loss < MAX_LOSS_WHEN_SATURATED:
            found["saturated"] = (
                f"the discriminator is saturated (accuracy {accuracy:.2f}, loss {loss:.3f}): it hardly learns, and what "
                "is left of its score within a group may be arbitrary. Lower discriminator_learning_rate, set "
                "discriminator_max_accuracy to hold it back, or give up a scalar head for discriminator_head='likelihood'. If "
                "its accuracy on held-out rows (eval_strategy) is much lower, it knows the teacher's training answers by "
                "heart: start from one that was trained less on them."
            )
        if accuracy < MIN_ACCURACY:
            found["inverted"] = (
                f"the discriminator is inverted (accuracy {accuracy:.2f} on fresh pairs): it prefers the student's "
                "samples, so its reward points away from the teacher. Replay past pairs (discriminator_replay_size), "
                "hold the student still below a bound (policy_min_accuracy), raise discriminator_learning_rate or "
                "lower learning_rate."
            )
        ratio = self._mean("completions/length_ratio")
        if ratio > MAX_LENGTH_RATIO or ratio < 1 / MAX_LENGTH_RATIO:
            found["length"] = (
                f"the student's answers are {ratio:.2f} times as long as the teacher's: the reward is probably being "
                "hacked through length. Set length_control=True, raise beta, or add a length reward."
            )
        for kind, name, least, remedy in (
            (
                "group_std",
                "discriminator/group_std",
                MIN_REMAINING_GROUP_STD,
                "Scores of a group agree, and normalisation blows their noise up. Set group_std_floor to a part of the "
                "value at the start, or scale_rewards='batch'.",
            ),
            (
                "entropy",
                "entropy",
                MIN_REMAINING_ENTROPY,
                "The student repeats itself. Raise beta, set entropy_coef, or lower learning_rate; earlier checkpoints "
                "may be better.",
            ),
        ):
            value = self._mean(name)
            if value is None:
                continue
            start = self.at_start.setdefault(name, value)
            if value < least * start:
                found[kind] = (
                    f"{name} has fallen to {value:.3g}, {value / start:.0%} of {start:.3g} at the start. {remedy}"
                )
        return found
