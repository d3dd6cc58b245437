"""The methods, by their names in recipes. Imports nothing heavy."""

from importlib import import_module
from typing import Any

from .method import Method


# A method's one line outside its folder: the module that holds its `METHOD`
METHODS = {
    "gad": "trl_bbkd.gad.method",
    "proxykd": "trl_bbkd.proxykd.method",
    "bayeskd": "trl_bbkd.bayeskd.method",
    "preferencekd": "trl_bbkd.preferencekd.method",
    "llkd": "trl_bbkd.llkd.method",
}


def load_method(name: str) -> Method:
    """The method of this name, one of [`METHODS`]."""
    return import_module(METHODS[name]).METHOD


def load_class(path: str) -> Any:
    """A class that a method names, as `"package.module:Class"`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
