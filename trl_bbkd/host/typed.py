"""Where what a type checker is told differs from what there is at run time."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    # Our mixins stand before a trainer, whose attributes they use; they have no base of their own
    from transformers import Trainer as MixinBase
else:
    MixinBase = object
