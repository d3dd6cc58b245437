"""Ways to train the same models: in full, as adapters, on 4-bit weights, on weights that two of them share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..runs.held_models import HeldModel, Phase, reference_of


ADAPTER = {"r": 16, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Way:
    """
    Args:
        name (`str`):
            As a table has it.
        is_adapter (`bool`), is_4bit (`bool`), is_shared (`bool`):
            Whether models are adapters, on weights in 4 bits, and whether one that can stands on the student's weights.
    """

    name: str
    is_adapter: bool = False
    is_4bit: bool = False
    is_shared: bool = False


WAYS = (
    Way("full"),
    Way("LoRA", is_adapter=True),
    Way("LoRA, shared", is_adapter=True, is_shared=True),
    Way("QLoRA", is_adapter=True, is_4bit=True),
    Way("QLoRA, shared", is_adapter=True, is_4bit=True, is_shared=True),
)


def in_a_way(phases: Sequence[Phase], way: Way) -> list[Phase]:
    """The same phases with models that are trained in a way."""
    return [replace(phase, models=_models(phase.models, way)) for phase in phases]


def _models(models: Sequence[HeldModel], way: Way) -> tuple[HeldModel, ...]:
    found: dict[str, HeldModel] = {}
    for model in models:
        if model.copies is not None:
            copy = reference_of(found[model.copies], model.name)
            found[model.name] = replace(copy, rows=model.rows, reads=model.reads)
        else:
            found[model.name] = _model(model, way)
    return tuple(found.values())


def _model(model: HeldModel, way: Way) -> HeldModel:
    is_shared = way.is_shared and bool(model.as_shared)
    if not way.is_adapter:
        # What learns in bfloat16 loses small steps
        dtype = "float32" if model.trains else model.dtype
        return replace(model, adapter=None, is_4bit=False, stands_on=None, dtype=dtype)
    return replace(
        model,
        adapter=model.adapter or ADAPTER,
        dtype="bfloat16",
        is_4bit=way.is_4bit and bool(model.in_4bit or is_shared),
        stands_on="student" if is_shared else None,
    )


def options(phases: Sequence[Phase], way: Way) -> str:
    """What to say on the command line for models of a recipe that are to be trained in a way, each option once."""
    words: dict[str, None] = {}
    for model in (model for phase in phases for model in phase.models if model.copies is None):
        is_shared = way.is_shared and bool(model.as_shared)
        if way.is_adapter and model.adapter is None and not is_shared:
            words[model.as_adapter] = None
        if way.is_4bit and not model.is_4bit and not is_shared:
            words[model.in_4bit] = None
        if is_shared and model.stands_on is None:
            words[model.as_shared] = None
    return " ".join(word for word in words if word)


def way_of(phases: Sequence[Phase]) -> Way | None:
    """The way of [`WAYS`] that a recipe already takes; `None` for one between them."""
    models = [model for phase in phases for model in phase.models if model.trains]
    is_adapter = {model.adapter is not None for model in models}
    is_4bit = {model.is_4bit for model in models if model.in_4bit}
    if len(is_adapter) > 1 or len(is_4bit) > 1:
        return None
    found = is_adapter == {True}, is_4bit == {True}, any(model.stands_on is not None for model in models)
    return next((way for way in WAYS if (way.is_adapter, way.is_4bit, way.is_shared) == found), None)


def ways_for(phases: Sequence[Phase]) -> list[Way]:
    """The ways in which these models can be trained."""
    models = [model for phase in phases for model in phase.models]
    can_share, can_4bit = any(model.as_shared for model in models), any(model.in_4bit for model in models)
    return [way for way in WAYS if (can_share or not way.is_shared) and (can_4bit or not way.is_4bit)]
