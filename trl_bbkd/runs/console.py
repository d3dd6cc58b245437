"""What of the log a terminal shows: a handful of numbers a line."""

from transformers import PrinterCallback, ProgressCallback


ALWAYS = ("epoch", "train_runtime", "train_loss")


class ShortLog:
    """
    Shows some entries of a line of the log. Trackers and `state.log_history` have all of them.

    Args:
        keys (`tuple[str, ...]`):
            Entries to show, where they are there.
    """

    def __init__(self, keys: tuple[str, ...]):
        super().__init__()
        self.keys = (*keys, *ALWAYS)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: logs[name] for name in self.keys if name in logs}
        # An evaluation's own, without the details that have a group of their own
        shown |= {name: value for name, value in logs.items() if name.startswith("eval_") and "/" not in name}
        super().on_log(args, state, control, logs=shown, **kwargs)


class ShortProgress(ShortLog, ProgressCallback):
    """A progress bar with short lines."""


class ShortPrinter(ShortLog, PrinterCallback):
    """Short lines without a progress bar."""
