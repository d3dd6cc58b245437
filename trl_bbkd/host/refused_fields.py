"""Fields of TRL that a trainer has no use for."""

import dataclasses


SHOWN_CHARACTERS = 80


def refuse_fields(args, refused: dict[str, str], where: str, harmless: dict[str, tuple] | None = None) -> None:
    """
    Refuse fields of TRL's configuration that would be taken and have no effect.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration, as it is after TRL's own checks.
        refused (`dict[str, str]`):
            Reason, and what to do instead, by the field's name.
        where (`str`):
            Where they have none, as in `"with soft targets"`.
        harmless (`dict[str, tuple]`, *optional*):
            Values of a field that, beside its default, say what is done anyway.

    Raises:
        ValueError: one of them was set to another value than its default.
    """
    defaults = {field.name: field for field in dataclasses.fields(args)}
    for name, reason in refused.items():
        value, field = getattr(args, name), defaults[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default and value not in (harmless or {}).get(name, ()):
            shown = " ".join(repr(value).split())[:SHOWN_CHARACTERS]
            raise ValueError(f"{name}={shown} is not possible {where}: {reason}")
