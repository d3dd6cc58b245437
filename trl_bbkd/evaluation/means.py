from collections import defaultdict

import torch
from accelerate import Accelerator


class EvaluationMeans:
    """
    Means over an evaluation, whatever its batches and processes.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Sums over its processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.begin(None)

    def begin(self, samples: int | None) -> None:
        """Begin an evaluation of `samples` samples over all processes; `None` where nobody knows how many."""
        self._samples, self._seen = samples, 0

    def are_new(self, num_samples: int) -> list[bool]:
        """
        Which of this process's `num_samples` samples of the next batch belong to the evaluation. The others repeat its first
        ones: accelerate fills the last batches of the processes up with them.
        """
        first = self._seen + self.accelerator.process_index * num_samples
        self._seen += self.accelerator.num_processes * num_samples
        return [self._samples is None or sample < self._samples for sample in range(first, first + num_samples)]

    def add(self, name: str, total: float, count: float) -> None:
        """Add `count` values that sum to `total`."""
        self.sums[name][0] += total
        self.sums[name][1] += count

    def pop_means(self, prefix: str) -> dict[str, float]:
        """The means, named `{prefix}_{name}`, and start again."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.tensor([self.sums[name] for name in names], dtype=torch.float64, device="cpu")
        sums = self.accelerator.reduce(sums.to(self.accelerator.device, torch.float32)).double()
        self.sums.clear()
        return {f"{prefix}_{name}": (total / count).item() for name, (total, count) in zip(names, sums, strict=True)}
