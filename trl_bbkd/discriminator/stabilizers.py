"""What keeps the game between student and discriminator from going wrong. Each is off by default; see `docs/gad.md`."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def std_floor_factor(group_std: torch.Tensor, floor: float, epsilon: float = 1e-4) -> torch.Tensor:
    """
    What turns advantages divided by `group_std` into advantages divided by at least `floor`.

    Raw scores that agree within a group differ by noise; dividing by their own tiny standard deviation blows that noise
    up to unit variance.

    Args:
        group_std (`torch.Tensor` of shape `(B,)`):
            Standard deviation that each sample's advantage was divided by, in units of the reward.
        floor (`float`):
            Smallest standard deviation to divide by, in the same units.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            What the division added to it.

    Returns:
        `torch.Tensor` of shape `(B,)`, in `(0, 1]`.
    """
    return (group_std + epsilon) / (group_std.clamp(min=floor) + epsilon)


def without_length_effect(scores: torch.Tensor, lengths: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Remove from scores the part that length explains within the groups.

    One slope is fitted by least squares to the within-group deviations of all groups (a slope of each group's own would
    fit noise: it has only a few samples). The mean score of a group stays.

    Args:
        scores (`torch.Tensor` of shape `(B,)`):
            Raw scores; the samples of a prompt are neighbours.
        lengths (`torch.Tensor` of shape `(B,)`):
            Length of each sample, in tokens.
        num_generations (`int`):
            Samples per prompt.

    Returns:
        `torch.Tensor` of shape `(B,)`. Its within-group covariance with length is 0.
    """
    groups = lengths.to(scores.dtype).view(-1, num_generations)
    deviations = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    square = (deviations**2).sum()
    if square == 0:
        return scores
    return scores - (deviations * scores).sum() / square * deviations


class ReplayBuffer:
    """
    Past pairs of a teacher's answer and a student's sample, to be shown to the discriminator again.

    Bounded: once full, a new pair takes the place of a random old one, so that the buffer thins out the past instead of
    forgetting it at once. The buffer has its own random numbers: what it draws depends on nothing else.

    Args:
        size (`int`):
            Most pairs to hold.
        seed (`int`):
            Seed of its random numbers.
    """

    FIELDS = ("prompt", "teacher", "student")

    def __init__(self, size: int, seed: int):
        self.size = size
        self.pairs: list[tuple[list[int], list[int], list[int]]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.pairs)

    def _randint(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))

    def add(self, pairs: list[tuple[list[int], list[int], list[int]]]) -> None:
        """Keep `(prompt_ids, teacher_ids, student_ids)` triples."""
        for pair in pairs:
            if len(self.pairs) < self.size:
                self.pairs.append(pair)
            else:
                self.pairs[self._randint(self.size)] = pair

    def sample(self, number: int) -> list[tuple[list[int], list[int], list[int]]]:
        """Draw `number` different pairs, or all of them if there are fewer."""
        order = torch.randperm(len(self.pairs), generator=self.generator)
        return [self.pairs[index] for index in order[:number].tolist()]

    def save(self, path: Path) -> None:
        """Write pairs and random state to `path` (safetensors)."""
        tensors = {"generator": self.generator.get_state()}
        for column, name in enumerate(self.FIELDS):
            rows = [pair[column] for pair in self.pairs]
            tensors[f"{name}_lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
            tensors[f"{name}_ids"] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Restore what [`~ReplayBuffer.save`] wrote."""
        tensors = load_file(path)
        self.generator.set_state(tensors["generator"])
        self.pairs = self._pairs_of(tensors)

    def load_share(self, paths: list[Path], number: int, count: int) -> None:
        """
        Take over one share of what several buffers wrote; of more pairs than there is room for, some at random.

        Args:
            paths (`list[Path]`):
                Their files, in the same order for every share.
            number (`int`), count (`int`):
                The share's number, from 0, and how many shares there are.
        """
        pairs = [pair for path in paths for pair in self._pairs_of(load_file(path))]
        self.pairs = pairs[number::count]
        self.pairs = self.sample(self.size)

    def _pairs_of(self, tensors: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int], list[int]]]:
        columns = [
            [row.tolist() for row in tensors[f"{name}_ids"].split(tensors[f"{name}_lengths"].tolist())]
            for name in self.FIELDS
        ]
        return list(zip(*columns, strict=True))
