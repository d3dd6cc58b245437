"""Reward functions as GRPO takes them, beside a discriminator."""

import inspect
from collections.abc import Callable

from torch import nn

from ..host._compat import get_callable_name, is_async_callable


TEACHER_COMPLETION = "teacher_completion"


def without_what_grpo_does_not_pass(reward):
    """
    A reward function written for GRPO that names all it takes: the same, called without the teacher's answer.

    Args:
        reward (`Callable`, `str` or [`~transformers.PreTrainedModel`]):
            One of `reward_funcs`. What takes the answer, or is no function, is returned as it is.
    """
    if isinstance(reward, str | nn.Module):
        return reward
    parameters = inspect.signature(reward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if takes_all or TEACHER_COMPLETION in parameters:
        return reward

    def call(**kwargs):
        kwargs.pop(TEACHER_COMPLETION)
        return reward(**kwargs)

    async def call_async(**kwargs):
        return await call(**kwargs)

    wrapped: Callable = call_async if is_async_callable(reward) else call
    wrapped.__name__ = get_callable_name(reward)  # metrics are named after it
    return wrapped
