"""Where what a type checker is told differs from what there is at run time."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    # Our mixins stand before a trainer, whose attributes they use; they have no base of their own
    from transformers import Trainer as MixinBase

    # Once a configuration is made, text from the command line has been read
    KeywordArguments = dict[str, Any]
else:
    MixinBase = object
    KeywordArguments = dict[str, Any] | str
