"""
LLKD's selection: rows of which the teacher is sure and the student is not, by thresholds that move with both.

c is the teacher's confidence, u the student's uncertainty, y a row's group (its pseudo-label, task or source). What is
known of LLKD (arXiv 2411.08028) is that there are two thresholds per class, moving averages adjusted by class, and
weights of both signals. Every formula here is our reading (`maxnorm` is FreeMatch's, arXiv 2205.07246) or our choice.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import LLKDDataError


RULES = ("class_mean", "maxnorm", "global", "quantile", "random")
BUDGETED = ("quantile", "random")
WEIGHTINGS = ("product", "sum", "teacher", "student", "none")
# A value is at its threshold when it is less than this below it: ties are kept
EPS = 1e-6


class Thresholds(NamedTuple):
    """
    The thresholds last used, in float64; NaN where the rule has none.

    Args:
        teacher, student (`torch.Tensor` of shape `(G,)`):
            Least c and least u of each group, `τ^T(y)` and `τ^S(y)`, in the units of c and u.
        score (`torch.Tensor` of shape `()`):
            Least score of the rule `"quantile"`.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    score: torch.Tensor


class Selection(NamedTuple):
    """
    Args:
        keep (`torch.Tensor` of shape `(N,)`):
            Boolean.
        weight (`torch.Tensor` of shape `(N,)`):
            In float64; 0 where a row is not kept, and 1 on average over the kept ones.
    """

    keep: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class SelectionSettings:
    """
    How rows are selected.

    Args:
        num_groups (`int`, *optional*, defaults to `1`):
            Number of groups, G.
        rule (`str`, *optional*, defaults to `"maxnorm"`):
            `"class_mean"`: a group's own average. `"maxnorm"`: the overall average, scaled by the group's average over
            the largest group's. `"global"`: the overall average. `"quantile"`: the best rows by c · u, as many as
            `budget` says. `"random"`: any rows, as many as `budget` says: the control of all others.
        momentum (`float`, *optional*, defaults to `0.99`):
            λ of the moving averages.
        use_teacher (`bool`, *optional*, defaults to `True`):
            Whether c decides.
        use_student (`bool`, *optional*, defaults to `True`):
            Whether u decides.
        weighting (`str`, *optional*, defaults to `"product"`):
            Weight of a kept row: `"product"` c · u, `"sum"` c + u, `"teacher"` c, `"student"` u, `"none"` 1.
        warmup_steps (`int`, *optional*, defaults to `0`):
            First updates, in which every row is kept.
        budget (`float`, *optional*):
            Share of rows that `"quantile"` and `"random"` keep.
        history_size (`int`, *optional*, defaults to `4096`):
            Number of past scores of `"quantile"`. Fewer follow the student faster, more hold the budget closer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `"random"`; a batch's draw depends on it and on the number of the update.
    """

    num_groups: int = 1
    rule: str = "maxnorm"
    momentum: float = 0.99
    use_teacher: bool = True
    use_student: bool = True
    weighting: str = "product"
    warmup_steps: int = 0
    budget: float | None = None
    history_size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("rule", RULES), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        for name, least in (("num_groups", 1), ("warmup_steps", 0), ("history_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1.")
        if self.rule in BUDGETED and not (self.budget is not None and 0.0 < self.budget < 1.0):
            raise ValueError(
                f"budget is {self.budget}; rule: {self.rule} needs a share between 0 and 1, such as 0.25."
            )
        if self.rule not in BUDGETED and self.budget is not None:
            raise ValueError(
                f"budget is for the rules {' and '.join(BUDGETED)}; rule: {self.rule} keeps as many rows as it finds."
            )

    @property
    def asks_student(self) -> bool:
        """Whether u changes anything; where it does not, nobody has to score a row."""
        decides = self.use_student and self.rule != "random"
        return decides or self.weighting in ("product", "sum", "student")


def group_means(values: torch.Tensor, group: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean of each group of a batch.

    Args:
        values, group (`torch.Tensor` of shape `(N,)`):
            A signal, and each row's group.
        num_groups (`int`):
            G.

    Returns:
        `tuple`: means, `(G,)`, 0 for an absent group; and which groups are present, `(G,)`, boolean.
    """
    counts = torch.bincount(group, minlength=num_groups)
    sums = torch.bincount(group, weights=values, minlength=num_groups)
    return sums / counts.clamp(min=1), counts > 0


def ema(
    mean: torch.Tensor, weight: torch.Tensor, value: torch.Tensor, momentum: float, present: torch.Tensor | bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One step of a moving average with bias correction, `V_t / W_t` where

        V_t = λ V_{t-1} + (1 - λ) z_t        W_t = λ W_{t-1} + (1 - λ)        V_0 = W_0 = 0

    as `mean_t = mean_{t-1} + (1 - λ) / W_t · (z_t - mean_{t-1})`, which after the first batch is that batch's value to
    the last bit.

    Args:
        mean, weight (`torch.Tensor`):
            Corrected average `V / W` and W so far; 0 at the beginning.
        value (`torch.Tensor`):
            Value of the batch, z.
        momentum (`float`):
            λ.
        present (`torch.Tensor`, *optional*, defaults to `True`):
            Where there is a value; elsewhere nothing changes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the new `mean` and `weight`.
    """
    present = torch.as_tensor(present)
    weight = torch.where(present, momentum * weight + (1.0 - momentum), weight)
    return torch.where(present, mean + (1.0 - momentum) / weight * (value - mean), mean), weight


def group_thresholds(mean: torch.Tensor, group_mean: torch.Tensor, seen: torch.Tensor, rule: str) -> torch.Tensor:
    """
    Thresholds of one signal: with its averages g overall and k(y) of a group,

        class_mean   τ(y) = k(y)
        maxnorm      τ(y) = k(y) / max_y' k(y') · g
        global       τ(y) = g

    and `τ(y) = g` for a group never seen.

    Args:
        mean (`torch.Tensor` of shape `()`):
            g.
        group_mean, seen (`torch.Tensor` of shape `(G,)`):
            k, and which groups were seen.
        rule (`str`):
            The rule.

    Returns:
        `torch.Tensor` of shape `(G,)`.
    """
    overall = mean.expand_as(group_mean)
    if rule == "global":
        return overall.clone()
    if rule == "maxnorm":
        largest = group_mean.masked_fill(~seen, 0.0).amax()
        # A signal that is 0 everywhere
        group_mean = group_mean / largest * mean if largest > 0 else overall
    return torch.where(seen, group_mean, overall)


def selection_scores(
    confidence: torch.Tensor, uncertainty: torch.Tensor, use_teacher: bool = True, use_student: bool = True
) -> torch.Tensor:
    """Scores `c · u`, `(N,)`, of which the rule `"quantile"` keeps the highest; a signal that is not used counts 1."""
    scores = confidence if use_teacher else torch.ones_like(confidence)
    return scores * uncertainty if use_student else scores


def selection_mask(
    confidence: torch.Tensor,
    uncertainty: torch.Tensor,
    group: torch.Tensor,
    thresholds: Thresholds,
    use_teacher: bool = True,
    use_student: bool = True,
) -> torch.Tensor:
    """
    Which rows to keep:

        c ≥ τ^T(y)  and  u ≥ τ^S(y),        or, where there is a threshold of scores,        c · u ≥ τ

    Args:
        confidence, uncertainty, group (`torch.Tensor` of shape `(N,)`):
            c, u and y.
        thresholds ([`Thresholds`]):
            τ.
        use_teacher, use_student (`bool`, *optional*, defaults to `True`):
            Whether c and u decide.

    Returns:
        `torch.Tensor` of shape `(N,)`, boolean.
    """
    if not thresholds.score.isnan():
        return selection_scores(confidence, uncertainty, use_teacher, use_student) >= thresholds.score - EPS
    keep = torch.ones_like(group, dtype=torch.bool)
    if use_teacher:
        keep &= confidence >= thresholds.teacher[group] - EPS
    if use_student:
        keep &= uncertainty >= thresholds.student[group] - EPS
    return keep


def random_rows(rows: int, share: float, seed: int, step: int) -> torch.Tensor:
    """
    A random share of a batch: `⌊share · N + r⌋` of its N rows, with r uniform in [0, 1), which is `share · N` on average.

    Returns:
        `torch.Tensor` of shape `(N,)`, boolean: the same in every process, and in a run that was resumed.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    number = int(share * rows + torch.rand((), generator=generator, dtype=torch.float64))
    keep = torch.zeros(rows, dtype=torch.bool)
    keep[torch.randperm(rows, generator=generator)[:number]] = True
    return keep


def sample_weights(
    confidence: torch.Tensor, uncertainty: torch.Tensor, keep: torch.Tensor, weighting: str
) -> torch.Tensor:
    """
    Weights `w = f(c, u)` of kept rows, rescaled so that their mean is 1.

    Args:
        confidence (`torch.Tensor` of shape `(N,)`):
            c, from 0 to 1.
        uncertainty (`torch.Tensor` of shape `(N,)`):
            u; in `"sum"` its scale matters, so that it should be from 0 to 1 as well.
        keep (`torch.Tensor` of shape `(N,)`):
            Which rows are kept, boolean.
        weighting (`str`):
            `"product"`, `"sum"`, `"teacher"`, `"student"` or `"none"`.

    Returns:
        `torch.Tensor` of shape `(N,)`: 0 where a row is not kept. 1 for all kept rows if each of them would have 0.
    """
    kept = keep.to(confidence.dtype)
    weights = {
        "product": confidence * uncertainty,
        "sum": confidence + uncertainty,
        "teacher": confidence,
        "student": uncertainty,
        "none": kept,
    }[weighting] * kept
    if not weights.any():
        return kept
    # Of a student that is all but certain every weight is tiny: its inverse may overflow
    weights = weights / weights.amax()
    return weights * (kept.sum() / weights.sum())


class Selector:
    """
    The moving thresholds of a run.

    It sees the batch of all processes: they gather c, u and y first, and then all come to the same state. State and
    results are on the CPU, in float64.

    Args:
        settings ([`SelectionSettings`]):
            How to select.
    """

    STATE = ("step", "mean", "weight", "group_mean", "group_weight", "history", "score_threshold")

    def __init__(self, settings: SelectionSettings):
        self.settings = settings
        groups = settings.num_groups
        self.step = torch.zeros((), dtype=torch.int64)
        # Teacher's and student's signal
        self.mean = torch.zeros(2, dtype=torch.float64)
        self.weight = torch.zeros((), dtype=torch.float64)
        self.group_mean = torch.zeros(2, groups, dtype=torch.float64)
        self.group_weight = torch.zeros(groups, dtype=torch.float64)
        self.history = torch.zeros(0, dtype=torch.float64)
        self.score_threshold = torch.full((), torch.nan, dtype=torch.float64)

    def update(self, confidence: torch.Tensor, uncertainty: torch.Tensor, group: torch.Tensor) -> None:
        """
        Move the thresholds by a batch; an empty one changes nothing.

        Args:
            confidence, uncertainty (`torch.Tensor` of shape `(N,)`):
                c and u.
            group (`torch.Tensor` of shape `(N,)`):
                y, integers from 0 to G - 1.

        Raises:
            [`~errors.LLKDDataError`]: a group that does not exist, or a signal that is not finite.
        """
        confidence, uncertainty, group = self._checked(confidence, uncertainty, group)
        if not len(group):
            return
        settings = self.settings
        signals = (confidence, uncertainty)
        batch_mean = torch.stack([signal.mean() for signal in signals])
        self.mean, self.weight = ema(self.mean, self.weight, batch_mean, settings.momentum)
        means, present = zip(*(group_means(signal, group, settings.num_groups) for signal in signals), strict=True)
        self.group_mean, self.group_weight = ema(
            self.group_mean, self.group_weight, torch.stack(means), settings.momentum, present[0]
        )
        if settings.rule == "quantile":
            scores = selection_scores(confidence, uncertainty, settings.use_teacher, settings.use_student)
            # The batch that is selected from is not part of the history that it is compared with
            past = self.history if len(self.history) else scores
            self.score_threshold = torch.quantile(past, 1.0 - settings.budget)
            self.history = torch.cat([self.history, scores])[-settings.history_size :]
        self.step = self.step + 1

    @property
    def is_warming_up(self) -> bool:
        """Whether the last batch was kept as a whole because the run has just begun."""
        return int(self.step) <= self.settings.warmup_steps

    def thresholds(self) -> Thresholds:
        """The thresholds that the last batch was compared with."""
        seen, rule = self.group_weight > 0, self.settings.rule
        if rule in BUDGETED:
            unused = torch.full_like(self.group_weight, torch.nan)
            return Thresholds(unused, unused.clone(), self.score_threshold)
        teacher, student = (group_thresholds(self.mean[i], self.group_mean[i], seen, rule) for i in range(2))
        return Thresholds(teacher, student, torch.full_like(self.weight, torch.nan))

    def select(self, confidence: torch.Tensor, uncertainty: torch.Tensor, group: torch.Tensor) -> Selection:
        """
        Choose from a batch: [`~Selector.update`] first, then [`selection_mask`]. During the warm-up every row is kept.

        Args:
            confidence, uncertainty, group:
                As in [`~Selector.update`].

        Returns:
            [`Selection`]
        """
        self.update(confidence, uncertainty, group)
        confidence, uncertainty, group = self._checked(confidence, uncertainty, group)
        settings = self.settings
        keep = torch.ones(len(group), dtype=torch.bool)
        if not self.is_warming_up:
            if settings.rule == "random":
                keep = random_rows(len(group), settings.budget, settings.seed, int(self.step))
            else:
                used = settings.use_teacher, settings.use_student
                keep = selection_mask(confidence, uncertainty, group, self.thresholds(), *used)
        return Selection(keep, sample_weights(confidence, uncertainty, keep, settings.weighting))

    def _checked(
        self, confidence: torch.Tensor, uncertainty: torch.Tensor, group: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        confidence, uncertainty = (signal.detach().cpu().double() for signal in (confidence, uncertainty))
        group = group.cpu()
        if not len(confidence) == len(uncertainty) == len(group):
            raise ValueError(f"{len(confidence)} confidences, {len(uncertainty)} uncertainties, {len(group)} groups.")
        wrong = (group < 0) | (group >= self.settings.num_groups)
        if wrong.any():
            raise LLKDDataError(
                f"A row's group is {group[wrong][0].item()}, but num_groups is {self.settings.num_groups}: groups go "
                "from 0 to num_groups - 1."
            )
        for name, signal in (("the teacher's confidence", confidence), ("the student's uncertainty", uncertainty)):
            if not signal.isfinite().all():
                raise LLKDDataError(f"In the batch {name} is {signal[~signal.isfinite()][0].item()} for a row.")
        return confidence, uncertainty, group

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the state's tensors, for safetensors."""
        return {name: getattr(self, name).clone() for name in self.STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Restore what [`~Selector.state_dict`] gave.

        Raises:
            ValueError: a state of another number of groups, or none of a selector.
        """
        if set(state) != set(self.STATE):
            raise ValueError(f"This is no state of a selector: it has {sorted(state)}, not {sorted(self.STATE)}.")
        groups = state["group_weight"].numel()
        if groups != self.settings.num_groups:
            raise ValueError(f"The state has {groups} groups, but num_groups is {self.settings.num_groups}.")
        for name in self.STATE:
            setattr(self, name, state[name].to("cpu", getattr(self, name).dtype, copy=True))
