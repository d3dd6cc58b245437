"""
The keys of a recipe and the options of the launcher, read from source files.

To import a configuration takes seconds, in which torch is loaded; a typo is told without.
"""

import ast
import functools
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from .methods import load_method


# Where TRL and transformers, which export lazily, keep a class
HOMES = {
    "TrainingArguments": "transformers/training_args.py",
    "DPOConfig": "trl/trainer/dpo_config.py",
    "GRPOConfig": "trl/trainer/grpo_config.py",
    "SFTConfig": "trl/trainer/sft_config.py",
    "ModelConfig": "trl/trainer/model_config.py",
    "ScriptArguments": "trl/scripts/utils.py",
    "DatasetMixtureConfig": "trl/scripts/utils.py",
}


def recipe_keys(method: str) -> set[str] | None:
    """
    Names of the fields that a recipe of `method` may set, `method` and `env` aside.

    Returns:
        `set[str]`: the names; `None` if an installed library keeps its classes elsewhere than the tested one, or a method
        from outside names them in another way than ours do, and only the parser can tell.
    """
    found = load_method(method)
    try:
        return (
            _fields_of(found.config)
            | _fields_of(found.arguments)
            | _fields(_home("ModelConfig"), "ModelConfig")
            | _fields(_home("DatasetMixtureConfig"), "DatasetMixtureConfig")
        )
    except LookupError:
        return None


def own_keys(method: str) -> set[str]:
    """Of [`recipe_keys`], those that the method or this package defines, and not TRL; none where that cannot be told."""
    found = load_method(method)
    try:
        return _fields_of(found.config, own=True) | _fields_of(found.arguments, own=True)
    except LookupError:
        return set()


def launcher_options() -> set[str]:
    """Whatever in the source of `accelerate launch` looks like an option."""
    constants = (node for node in ast.walk(_tree(_installed("accelerate/commands/launch.py"))))
    texts = (node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {text for text in texts if text.startswith("-")}


def unknown_option(arguments: Collection[str], keys: Collection[str], also_valid: Collection[str]) -> str | None:
    """The first of `arguments` that is an option, but no key's (`--key`, `--no_key`, with `-` for `_`) and not valid."""
    options = {"--help", "--help_all", *also_valid, *(f"--{name}" for key in keys for name in (key, f"no_{key}"))}
    valid = {_underscored(option) for option in options}
    given = (argument.partition("=")[0] for argument in arguments)
    return next((option for option in given if option.startswith("--") and _underscored(option) not in valid), None)


def _underscored(option: str) -> str:
    return "--" + option[2:].replace("-", "_")


def _installed(path: str) -> Path:
    package, _, rest = path.partition("/")
    file = Path(find_spec(package).submodule_search_locations[0], rest)
    if not file.is_file():
        raise LookupError(path)
    return file


def _source(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.has_location:
        raise LookupError(module)
    return Path(spec.origin)


def _home(name: str) -> Path:
    return _installed(HOMES[name])


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _fields_of(path: str, own: bool = False) -> set[str]:
    """As [`_fields`], of a dataclass named `"package.module:Class"`."""
    module, _, name = path.partition(":")
    return _fields(_source(module), name, own)


def _fields(file: Path, name: str, own: bool = False) -> set[str]:
    """Names of the fields of dataclass `name`, those of its bases included; with `own` not those of [`HOMES`]."""
    tree = _tree(file)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        raise LookupError(name)
    fields = {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and not _is_no_field(node) and isinstance(node.target, ast.Name)
    }
    for base in found.bases:
        if not isinstance(base, ast.Name):
            raise LookupError(ast.unparse(base))
        if not (own and base.id in HOMES):
            fields |= _fields(_file_of(base.id, tree, file), base.id, own)
    return fields


def _is_no_field(node: ast.AnnAssign) -> bool:
    is_class_variable = "ClassVar" in ast.dump(node.annotation)
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else ()
    return is_class_variable or any(k.arg == "init" and getattr(k.value, "value", True) is False for k in keywords)


def _file_of(name: str, tree: ast.Module, file: Path) -> Path:
    """Where a base class named in `file` is defined."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            if node.level:
                return file.parents[node.level - 1] / f"{node.module.replace('.', '/')}.py"
            return _home(name) if name in HOMES else _source(node.module)
    return file
