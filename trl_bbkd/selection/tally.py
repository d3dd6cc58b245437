"""What a run looked at and what it learned from, counted: the same numbers whether it was logged, interrupted or neither."""

import torch


WARMUP, AFTER = 0, 1
UNKNOWN = -1


class SelectionTally:
    """
    Counts of rows over all processes, on the CPU.

    Args:
        num_groups (`int`):
            Number of groups, G.
        num_rows (`int`):
            One more than the largest row id.
        gold (`torch.Tensor` of shape `(num_rows,)`, *optional*):
            The true group of each row id, -1 where it is not known; a row's own group is then right or wrong.
    """

    STATE = ("seen", "kept", "used", "checked", "right")

    def __init__(self, num_groups: int, num_rows: int, gold: torch.Tensor | None = None):
        self.gold = gold
        # During the warm-up and after it, by group
        self.seen = torch.zeros(2, num_groups, dtype=torch.int64)
        self.kept = torch.zeros(2, num_groups, dtype=torch.int64)
        self.used = torch.zeros(num_rows, dtype=torch.bool)
        # After the warm-up: rows dropped and kept whose true group is known, and those that have it
        self.checked = torch.zeros(2, dtype=torch.int64)
        self.right = torch.zeros(2, dtype=torch.int64)

    def add(self, row_id: torch.Tensor, group: torch.Tensor, keep: torch.Tensor, is_warmup: bool) -> None:
        """
        Count a batch.

        Args:
            row_id, group (`torch.Tensor` of shape `(N,)`):
                Each row's id, and its group.
            keep (`torch.Tensor` of shape `(N,)`):
                Which rows are learned from, boolean.
            is_warmup (`bool`):
                Whether every row is kept because the run has just begun.
        """
        stage, groups = WARMUP if is_warmup else AFTER, self.seen.size(1)
        self.seen[stage] += torch.bincount(group, minlength=groups)
        self.kept[stage] += torch.bincount(group[keep], minlength=groups)
        self.used[row_id[keep]] = True
        if self.gold is not None and not is_warmup:
            gold = self.gold[row_id]
            known = gold != UNKNOWN
            self.checked += torch.bincount(keep[known].long(), minlength=2)
            self.right += torch.bincount(keep[known & (gold == group)].long(), minlength=2)

    @property
    def kept_share(self) -> float:
        """Share of the rows seen that were learned from, the warm-up included."""
        return (self.kept.sum().double() / self.seen.sum()).item()

    @property
    def kept_share_by_group(self) -> list[float]:
        """The same of each group after the warm-up; NaN of one that was not seen."""
        return (self.kept[AFTER].double() / self.seen[AFTER]).tolist()

    @property
    def distinct_rows(self) -> int:
        """Different rows learned from."""
        return int(self.used.sum())

    @property
    def accuracy(self) -> tuple[float, float]:
        """Share of right groups among the rows that were dropped, and that were kept, after the warm-up; NaN of none."""
        dropped, kept = (self.right.double() / self.checked).tolist()
        return dropped, kept

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the counts, for safetensors."""
        return {f"tally.{name}": getattr(self, name).clone() for name in self.STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what [`~SelectionTally.state_dict`] gave."""
        for name in self.STATE:
            setattr(self, name, state[f"tally.{name}"].clone())
