"""The tables of `recipes.md`, `collect.md` and `evaluate.md`: every key, read from the dataclasses when the site is built."""

import dataclasses
import enum
import functools
import html
import importlib
import re
import sys
import types
import typing
import warnings
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = ("recipes.md", "collect.md", "evaluate.md")
MARKER = re.compile(r"<!-- keys: (\w+) -->")
CONFIGS = {
    "gad": "GADConfig",
    "proxykd": "ProxyKDConfig",
    "bayeskd": "BayesKDConfig",
    "preferencekd": "PreferenceKDConfig",
    "llkd": "LLKDConfig",
}
# What nearly every recipe sets of TRL's and transformers' keys
COMMON = (
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "temperature",
    "beta",
    "use_peft",
    "save_steps",
    "bf16",
    "use_cpu",
    "seed",
)
HEAD = "<thead><tr><th>key, and its class</th><th>type, and default</th><th>what it is</th></tr></thead>"


class Key(typing.NamedTuple):
    """A row of a table."""

    name: str
    type: str
    default: str
    help: str
    owner: str
    is_ours: bool
    verdict: str


def on_page_markdown(markdown: str, page, **_) -> str:
    """Put the tables where their markers are."""
    if page.file.src_uri not in PAGES:
        return markdown
    return MARKER.sub(lambda marker: tables(marker[1]), markdown)


@functools.cache
def tables(method: str) -> str:
    """The tables of one method, of a collection or of an evaluation, as Markdown."""
    if method == "collect":
        return _table(keys_of_collect())
    if method == "evaluate":
        return _table(keys_of_evaluate())
    if method == "eval_judge":
        return _table(keys_of_eval_judge())
    keys = keys_of(method)
    taken = [key for key in keys if not key.verdict.startswith("refused")]
    own = [key for key in taken if key.is_ours]
    common = [key for key in taken if key.name in COMMON and key not in own]
    common.sort(key=lambda key: COMMON.index(key.name))
    rest = [key for key in taken if not key.is_ours and key.name not in COMMON]
    refused = [key for key in keys if key.verdict.startswith("refused")]
    return "\n\n".join(
        [
            f"**Its own {len(own)}**",
            _table(own),
            "**Of TRL's and transformers', those that most recipes set**",
            _table(common),
            _folded(f"The other {len(rest)} of TRL and transformers", _table(rest)),
            _folded(f"Refused: {len(refused)} that would have no effect here, or harm", _table(refused)),
        ]
    )


def keys_of(method: str) -> list[Key]:
    """Every key that a recipe of `method` may name, `method` and `env` aside."""
    with warnings.catch_warnings(action="ignore"):
        import trl

        import trl_bbkd
        from trl_bbkd.runs import recipe
    arguments = recipe.ClassifierArguments if method == "llkd" else recipe.RecipeArguments
    config = getattr(trl_bbkd, CONFIGS[method])
    verdicts = _verdicts(method)
    keys = {}
    for cls in (config, arguments, trl.ModelConfig, trl.DatasetMixtureConfig):
        hints = typing.get_type_hints(cls)
        for field in (field for field in dataclasses.fields(cls) if field.init):
            keys.setdefault(field.name, _key(field, cls, hints[field.name], verdicts.get(field.name, "")))
    return list(keys.values())


def keys_of_collect() -> list[Key]:
    """Every key of a recipe of `trl-bbkd collect`."""
    from trl_bbkd.collect.settings import CollectConfig

    hints = typing.get_type_hints(CollectConfig)
    return [_key(field, CollectConfig, hints[field.name], "") for field in dataclasses.fields(CollectConfig)]


def keys_of_evaluate() -> list[Key]:
    """Every option of `trl-bbkd evaluate` beside those that its page names: what is judged, the judge's endpoint, benchmarks."""
    from trl_bbkd.judging.settings import JUDGE_KEYS, OWN_KEYS, EvaluateConfig, JudgeConfig
    from trl_bbkd.tasks.settings import TASK_KEYS, TasksConfig

    return [
        _key(field, cls, typing.get_type_hints(cls)[field.name], "")
        for cls, names in ((EvaluateConfig, OWN_KEYS), (JudgeConfig, JUDGE_KEYS), (TasksConfig, TASK_KEYS))
        for field in dataclasses.fields(cls)
        if field.name in names
    ]


def keys_of_eval_judge() -> list[Key]:
    """Every key of a recipe's `eval_judge` that an evaluation's page does not have as the judge's."""
    from trl_bbkd.judging.settings import EVAL_JUDGE_KEYS, JUDGE_KEYS, EvalJudgeConfig

    hints = typing.get_type_hints(EvalJudgeConfig)
    named = {field.name: field for field in dataclasses.fields(EvalJudgeConfig)}
    own = [name for name in EVAL_JUDGE_KEYS if name not in JUDGE_KEYS]
    return [_key(named[name], EvalJudgeConfig, hints[name], "") for name in own]


def _verdicts(method: str) -> dict[str, str]:
    """What becomes of TRL's fields, as the tests hold it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if method == "gad":
        return importlib.import_module("tests.gad.gad_fields").INHERITED
    fields = importlib.import_module("tests.drop_in.fields")
    gad_only = {"reward_funcs": "refused: for GAD, which adds them to its discriminator's score"}
    tables = {"llkd": fields.CLASSIFIER, "preferencekd": fields.PREFERENCE}
    return {**tables.get(method, fields.SOFT_TARGETS), **gad_only}


def _key(field: dataclasses.Field, cls: type, hint, verdict: str) -> Key:
    owners = [owner for owner in cls.__mro__ if field.name in owner.__dict__.get("__annotations__", {})]
    last, first = owners[0], owners[-1]
    default = _default(field)
    theirs = next((owner for owner in owners if not _is_ours(owner)), None)
    if theirs is not None and _is_ours(last):
        before = _default(theirs.__dataclass_fields__[field.name])
        default += f" ({_library(theirs)}: {before})" if before != default else ""
    text = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
    return Key(field.name, _type(hint), default, text, first.__name__, _is_ours(first), verdict)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("trl_bbkd")


def _library(cls: type) -> str:
    return {"trl": "TRL", "transformers": "transformers"}[cls.__module__.partition(".")[0]]


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if str(value) else "empty"


def _type(hint) -> str:
    """A type, as what one writes in YAML."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(members[0])
    if origin is dict:
        return "dict"
    if origin in (typing.Union, types.UnionType):
        names = dict.fromkeys(_type(member) for member in members if member is not type(None))
        if "dict" in names:
            names.pop("str", None)  # the command line's way of writing it
        return " or ".join(names)
    if origin is typing.Literal:
        return " or ".join(f"`{member}`" for member in members)
    if origin is not None:
        inside = ", ".join(_type(member) for member in members if member is not Ellipsis)
        return f"{origin.__name__} of {inside}" if inside else origin.__name__
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "str"
    return getattr(hint, "__name__", str(hint))


def _table(keys: list[Key]) -> str:
    rows = "".join(map(_row, keys))
    return f'<div class="keys"><table>{HEAD}<tbody>{rows}</tbody></table></div>'


def _row(key: Key) -> str:
    kind, _, why = key.verdict.partition(": ")
    text = {"refused": why, "differs": f"{key.help} **Here:** {why}."}.get(kind, key.help)
    name = key.name.replace("_", "_<wbr>")
    cells = (
        f"<code>{name}</code><small>{key.owner}</small>",
        f"{_inline(key.type)}<small>{_inline(key.default)}</small>",
        _inline(text),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _inline(text: str) -> str:
    """Markdown of a help text, code and bold, as HTML."""
    text = re.sub(r"`+([^`]+)`+", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _folded(title: str, table: str) -> str:
    return f'<details class="note"><summary>{title}</summary>{table}</details>'
