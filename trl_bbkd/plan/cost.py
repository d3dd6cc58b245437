"""
How much a step computes, and about how long that takes.

Operations are counted: two for each weight and token, and attention's. Times are estimates, from the utilisation that is stated
and from the constants below; a device's link and memory are an H100's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..runs.held_models import HeldModel, Phase
from .memory import DEVICES_OF_A_MACHINE, FLOAT32, ModelSize, Setting


# Seconds of `model.generate` for each layer and token, whatever the number of rows. Measured on an H100 (docs/gpu/h100.md): 1.5, 1.2
# and, with an adapter, 2.8 ms
GENERATE_LAYER, GENERATE_ADAPTED_LAYER = 1.3e-3, 2.8e-3
# Bytes a second. Assumed: 60 % of an H100's memory; NVLink within a machine of 8; a network beyond
MEMORY_BANDWIDTH, LINK, NETWORK = 0.6 * 3.35e12, 300e9, 40e9


@dataclass(frozen=True)
class Part:
    """
    A part of an optimizer step, on one device.

    Args:
        name (`str`):
            Such as `"sampling"`.
        operations (`float`):
            Floating-point operations.
        seconds (`float`):
            Of computing.
        gathering (`float`):
            Seconds in which weights and gradients are exchanged, at best at the same time.
    """

    name: str
    operations: float
    seconds: float
    gathering: float = 0.0

    @property
    def took(self) -> float:
        return max(self.seconds, self.gathering)

    @property
    def waits_for_weights(self) -> bool:
        return self.gathering > self.seconds


def forward_operations(size: ModelSize, tokens: float, length: int) -> float:
    """Operations of a forward pass over `tokens` tokens in rows of `length`: products with weights, and causal attention."""
    products = 2 * (size.linear + size.head) * tokens
    return products + 2 * size.layers * size.attention * length * tokens


def learning_factor(has_adapter: bool, checkpoints: bool) -> int:
    """Forward passes that a step costs: frozen weights have no gradient of their own; checkpoints compute one pass again."""
    return (2 if has_adapter else 3) + checkpoints


def parts_of(phase: Phase, sizes: Mapping[str, ModelSize], setting: Setting, flops: float) -> list[Part]:
    """
    The parts of a step, in their order.

    Args:
        phase ([`~runs.held_models.Phase`]):
            The phase.
        sizes (`Mapping[str, ModelSize]`):
            Of its models, by name.
        setting ([`~memory.Setting`]):
            Devices and engine.
        flops (`float`):
            Operations a second that a device reaches.
    """
    found = []
    if phase.sampled:
        sampler = next(model for model in phase.models if model.name == phase.sampler)
        found.append(sampling(phase, sampler, sizes[sampler.name], setting, flops))
    for model in phase.models:
        size, rows = sizes[model.name], phase.step_rows
        for verb, share in (("reads", model.reads), ("learns", model.learns if model.trains else 0.0)):
            if not share:
                continue
            operations = forward_operations(size, share * rows * phase.tokens, phase.tokens)
            passes = 1
            if verb == "learns":
                passes = learning_factor(model.adapter is not None, setting.checkpoints)
            chunks = -(-share * rows // model.rows)
            exchange = gathering(model, size, setting, verb == "learns") * chunks
            found.append(Part(f"the {model.name} {verb}", operations * passes, operations * passes / flops, exchange))
    return found


def sampling(phase: Phase, model: HeldModel, size: ModelSize, setting: Setting, flops: float) -> Part:
    """A step's samples: `model.generate`, whose time is that of starting kernels, or vLLM, which waits for memory."""
    rows = phase.step_rows
    operations = forward_operations(size, rows * phase.tokens, phase.tokens)
    passes = -(-rows // phase.sampled) * phase.new_tokens
    weights = size.parameters * setting.compute_bytes
    cache = 2 * size.layers * size.kv * setting.compute_bytes * min(rows, phase.sampled) * phase.tokens / 2
    seconds = max(operations / flops, passes * (weights + cache) / MEMORY_BANDWIDTH)
    if not phase.uses_vllm:
        seconds = max(seconds, passes * seconds_a_token(model, size))
    exchange = weights / bandwidth(setting)
    if setting.devices == 1 or not setting.shards_weights:
        exchange = 0.0
    elif setting.is_fsdp and not phase.uses_vllm:
        # Every token gathers every layer once more
        exchange *= passes
    return Part(f"the {model.name} samples", operations, seconds, exchange)


def seconds_a_token(model: HeldModel, size: ModelSize) -> float:
    """Seconds that `model.generate` takes for the next token of all its rows."""
    return size.layers * (GENERATE_LAYER if model.adapter is None else GENERATE_ADAPTED_LAYER)


def evaluation_seconds(model: HeldModel, size: ModelSize, setting: Setting, tokens: float) -> float:
    """Seconds of `tokens` tokens one after the other in the report's batches; a sharded student is gathered for each."""
    a_token = seconds_a_token(model, size)
    if setting.devices > 1 and setting.shards_weights:
        a_token = max(a_token, size.parameters * setting.compute_bytes / bandwidth(setting))
    return tokens * a_token


def gathering(model: HeldModel, size: ModelSize, setting: Setting, learns: bool) -> float:
    """Seconds in which a sharded model's weights come together for one pass, and its gradients are divided."""
    if setting.devices == 1 or model.is_whole or not setting.shards_weights:
        return 0.0
    passes = 1 if not learns else 2 + setting.checkpoints * (setting.engine == "zero3")
    weights = size.parameters * setting.compute_bytes * passes
    gradients = 0 if not learns or model.adapter is not None else size.parameters * FLOAT32
    seconds = (weights + gradients) / bandwidth(setting)
    if setting.devices > setting.parts:
        # Machines add up their parts of the gradient, there and back
        seconds += 2 * gradients / setting.parts / NETWORK
    return seconds


def bandwidth(setting: Setting) -> float:
    """Bytes a second between the devices that have a model together: of the slowest link there is."""
    return LINK if setting.parts <= DEVICES_OF_A_MACHINE else NETWORK
