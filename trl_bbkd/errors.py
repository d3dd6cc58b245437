"""What a user can mend: one tree, whose root a program can catch. Each is a type of the standard library as well."""


def kind_of(value: object) -> str:
    """The name of a value's type with its article, for a message: `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


class DistillationError(Exception):
    """Something in rows, settings, models or folders does not fit; the message says what, and what to do."""


class HubError(DistillationError, RuntimeError):
    """The Hub did not take what it was sent; the message says where it lies and how to send it again."""


class PseudoLabelError(DistillationError, ValueError):
    """Input from which no pseudo-labels can be made, or that cannot be compared with gold labels."""


class VocabularyError(DistillationError, ValueError):
    """Proxy and student do not share a tokenizer; the message names the first tokens that differ."""


class TargetStoreError(DistillationError, ValueError):
    """A store of soft targets cannot be used as it is; the message says why and what to do."""


class TeacherDataError(DistillationError, ValueError):
    """The teacher text cannot be used as it is; the message says where and what to do."""


class RecipeError(DistillationError, ValueError):
    """A recipe, or an override of it, cannot be used as it is; the message says where and what to do."""


class ComparisonError(DistillationError, ValueError):
    """Runs cannot be put side by side; the message says why and what to do."""


class ProxyModelError(DistillationError, ValueError):
    """A proxy's checkpoint cannot be used as it is; the message says why and what to do."""


class StageError(DistillationError, ValueError):
    """A stage cannot be gone on with; the message says why and what to do."""


class NGramError(DistillationError, ValueError):
    """Counts cannot be made or used as asked; the message says why and what to do."""


class LLKDDataError(DistillationError, ValueError):
    """Data that LLKD cannot select by."""


class DiskFullError(DistillationError, RuntimeError):
    """There is no space left; the message says what of the run is safe."""


class DivergedError(DistillationError, RuntimeError, FloatingPointError):
    """A training whose numbers are none any more; the message says what to lower."""


class JudgeError(DistillationError, ValueError):
    """A function that judges samples returned something else than one number a sample."""


class WeightsError(DistillationError, ValueError):
    """A file of weights cannot be read; the message names it."""


class NoStepsError(DistillationError, ValueError):
    """A training ended without an optimizer step."""


class EndpointError(DistillationError, RuntimeError):
    """A teacher's endpoint does not answer as it should; the message says what it said."""


class JournalError(DistillationError, ValueError):
    """A journal of answers cannot be used; the message says why and what to do."""
