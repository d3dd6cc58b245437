"""
What a model takes on one device, in bytes: pure functions of counts.

Sources. *Measured* is what an H100 held (docs/gpu/h100.md), for Qwen-shaped models on one GPU. Of sharding, the shares are what
processes on a CPU held (tests/plan/test_shares.py); everything else of it follows from how the engines work and was not measured:
FSDP2 gathers one decoder layer at a time, keeps the root's weights (embedding, norm, output layer) gathered, and reduces whole
gradients of a layer in float32; DeepSpeed has buckets of 5·10⁸ numbers and keeps at most 10⁹ weights gathered.
"""

from dataclasses import dataclass
from typing import Literal


EngineName = Literal["ddp", "zero2", "zero3", "fsdp2", "hsdp"]
ENGINES: tuple[EngineName, ...] = ("ddp", "zero2", "fsdp2", "zero3")
# In parts within a machine, copied from machine to machine
ENGINES_OF_MACHINES: tuple[EngineName, ...] = ("ddp", "zero2", "hsdp", "fsdp2", "zero3")
DEVICES_OF_A_MACHINE = 8

GIB = 2**30
FLOAT32 = 4
ADAM_MOMENTS = 2
# NF4: half a byte a weight, and a float32 scale for each 64 of them
BYTES_IN_4BIT = 0.5 + FLOAT32 / 64
LAYERS_IN_FLIGHT = 3  # the one that computes, the next one and the last one
DEEPSPEED_BUCKET = 500_000_000
DEEPSPEED_LIVE_WEIGHTS = 1_000_000_000
# TRL's product of hidden states and output layer: tokens and vocabulary of a tile
TILE = 4096 * 8192
# What PyTorch's allocator kept beyond what was used: at most 2.3 GiB, measured. CUDA's context 0.5 GiB and NCCL's buffers 1 GiB:
# estimates
ALLOCATOR, CUDA_CONTEXT, NCCL = int(2.3 * GIB), GIB // 2, GIB


@dataclass(frozen=True)
class ModelSize:
    """
    Counts of a model's numbers. None of them is in bytes.

    Args:
        parameters (`int`):
            All weights, an adapter's left out.
        adapter (`int`):
            Weights of its adapter.
        linear (`int`):
            Weights of the linear layers within the decoder layers.
        layer (`int`):
            Weights of the largest decoder layer.
        tail (`int`):
            Weights outside the decoder layers: embedding, last norm, output layer.
        head (`int`):
            Weights of the output layer over tokens; 0 if there is none.
        layers (`int`), hidden (`int`), intermediate (`int`), vocabulary (`int`):
            As in its configuration.
        attention (`int`), kv (`int`):
            Width of all query heads, and of all key heads.
    """

    parameters: int
    adapter: int
    linear: int
    layer: int
    tail: int
    head: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    attention: int
    kv: int


@dataclass(frozen=True)
class Setting:
    """
    Devices and how they divide the models.

    Args:
        engine (`str`):
            `"ddp"`, `"zero2"`, `"fsdp2"`, `"hsdp"` or `"zero3"`.
        devices (`int`):
            How many.
        device_bytes (`int`):
            Memory of one.
        compute_bytes (`int`):
            Of a number that is computed with: 2 in bfloat16, 4 in float32.
        checkpoints (`bool`):
            Whether activations are computed again in the backward pass.
    """

    engine: EngineName
    devices: int
    device_bytes: int
    compute_bytes: int = 2
    checkpoints: bool = True

    @property
    def parts(self) -> int:
        """Over how many devices an engine divides what it divides."""
        return min(self.devices, DEVICES_OF_A_MACHINE) if self.engine == "hsdp" else self.devices

    @property
    def shards_weights(self) -> bool:
        return self.engine == "zero3" or self.is_fsdp

    @property
    def is_fsdp(self) -> bool:
        return self.engine in ("fsdp2", "hsdp")

    @property
    def is_deepspeed(self) -> bool:
        return self.engine in ("zero2", "zero3")

    @property
    def casts(self) -> bool:
        """Whether autocast makes a copy of float32 weights: FSDP2 and DeepSpeed compute with low-precision ones already."""
        return self.engine == "ddp" and self.compute_bytes < FLOAT32


def frozen_bytes(size: ModelSize, weight_bytes: int, is_4bit: bool) -> float:
    """Bytes of frozen weights, whole. In 4 bits are the linear layers; embedding and output layer stay as they are."""
    if not is_4bit:
        return size.parameters * weight_bytes
    return size.linear * BYTES_IN_4BIT + (size.parameters - size.linear) * weight_bytes


def trained_weight_bytes(trained: int, setting: Setting, weight_bytes: int, has_own_engine: bool) -> float:
    """
    Bytes of weights that learn, with their float32 masters. FSDP2 has masters alone (accelerate upcasts what is trained);
    DeepSpeed has masters beside the weights it computes with, which are float32 for a model beside the student
    ([`~host.engines.ZeroEngine`]).
    """
    shard = trained / setting.parts
    if setting.engine == "ddp":
        return trained * weight_bytes
    if setting.is_fsdp:
        return shard * FLOAT32
    computed = weight_bytes if has_own_engine else setting.compute_bytes
    return (trained if setting.engine == "zero2" else shard) * computed + shard * FLOAT32


def optimizer_bytes(trained: int, setting: Setting, weight_bytes: int) -> float:
    """Bytes of AdamW's two moments, which are of the weights' own type without an engine that shards."""
    if setting.engine == "ddp":
        return trained * weight_bytes * ADAM_MOMENTS
    return trained / setting.parts * FLOAT32 * ADAM_MOMENTS


def optimizer_temporaries(trained: int, setting: Setting) -> float:
    """
    Bytes that a step of PyTorch's AdamW takes for itself where it is not fused: one float32 number a weight. Measured: GAD of
    1.5 billion parameters peaks there. Under DeepSpeed the shard's gradient in float32 comes to it.
    """
    copies = 2 if setting.is_deepspeed else 1
    return trained * FLOAT32 * copies / (1 if setting.engine == "ddp" else setting.parts)


def bucket_bytes(trained: int, setting: Setting, weight_bytes: int) -> float:
    """Bytes that stay for the exchange of gradients: DDP's buckets are as large as they are; DeepSpeed has two of its size."""
    if setting.devices == 1 or setting.is_fsdp:
        return 0
    if setting.engine == "ddp":
        return trained * weight_bytes
    return 2 * min(trained, DEEPSPEED_BUCKET) * setting.compute_bytes


def gradient_bytes(size: ModelSize, trained: int, setting: Setting, weight_bytes: int, has_own_engine: bool) -> float:
    """Bytes of gradients while a model learns; under FSDP2 with the whole ones of two layers before they are reduced."""
    if setting.engine == "ddp":
        return trained * weight_bytes
    shard = trained / setting.parts
    if setting.is_fsdp:
        layer = size.layer if trained == size.parameters else trained / max(size.layers, 1)
        return shard * FLOAT32 + 2 * FLOAT32 * layer
    return shard * (weight_bytes if has_own_engine else setting.compute_bytes)


def in_flight_bytes(size: ModelSize, setting: Setting) -> float:
    """Bytes of weights that are gathered while a sharded model computes."""
    if setting.devices == 1 or not setting.shards_weights:
        return 0
    if setting.is_fsdp:
        numbers = min(size.parameters, LAYERS_IN_FLIGHT * size.layer + size.tail)
    else:
        numbers = min(size.parameters, DEEPSPEED_LIVE_WEIGHTS)
    return numbers * setting.compute_bytes


def activation_bytes(
    size: ModelSize,
    tokens: int,
    setting: Setting,
    has_adapter: bool,
    weight_bytes: int,
    loss_bytes: float,
) -> float:
    """
    Bytes at the largest moment of a forward and backward pass over `tokens` tokens: the forward pass's end, the loss, or a
    layer's backward pass. Measured.

    Between layers stand hidden states, which are float32 where the weights are and autocast computes; it then keeps a copy of
    what learns until the forward pass ends. In a layer: 14 numbers of the hidden size and 4 of the feed-forward's for each token,
    and with an adapter, whose weights are float32, its inputs once more.
    """
    is_cast = setting.casts and weight_bytes == FLOAT32
    between = FLOAT32 if is_cast else setting.compute_bytes
    copies = setting.compute_bytes if is_cast and not has_adapter else 0
    in_forward = tokens * (4 * size.intermediate * setting.compute_bytes + 3 * size.hidden * between)
    in_backward = tokens * setting.compute_bytes * (14 * size.hidden + 4 * size.intermediate)
    if has_adapter:
        in_backward += tokens * setting.compute_bytes * (6 * size.hidden + size.intermediate)
        in_backward += tokens * FLOAT32 * size.intermediate
    if not setting.checkpoints:
        return max(size.layers * in_backward + copies * size.linear, size.layers * in_backward + loss_bytes)
    checkpoints = size.layers * tokens * size.hidden * between
    layer = size.linear / max(size.layers, 1)
    return checkpoints + max(in_forward + copies * size.linear, loss_bytes, in_backward + copies * layer)


def reading_bytes(size: ModelSize, tokens: int, setting: Setting, weight_bytes: int) -> float:
    """Bytes of a forward pass that nothing learns from: one layer's activations, and autocast's copy of its weights."""
    copies = setting.compute_bytes if setting.casts and weight_bytes == FLOAT32 else 0
    return tokens * setting.compute_bytes * (4 * size.intermediate + 4 * size.hidden) + copies * size.layer


def log_prob_bytes(size: ModelSize, tokens: int, head_learns: bool) -> float:
    """
    Bytes of TRL's log-probabilities by tiles: a tile of logits, the float32 gradients of hidden states and, where it learns, of
    the output layer.
    """
    return TILE * 2 + tokens * size.hidden * FLOAT32 + head_learns * size.head * FLOAT32


def soft_target_bytes(
    tokens: int, hidden: int, vocabulary: int, chunk_elements: int, compute_bytes: int, is_dense: bool
) -> float:
    """
    Bytes of [`~soft_targets.kernel.soft_target_loss`] beside inputs and gradients. Measured: a chunk's logits in float32 and
    their gradient, a dense target's logits, a chunk's share of the output layer's gradient, and the hidden states' gradient.
    """
    chunk = min(tokens * vocabulary, chunk_elements)
    per_logit = FLOAT32 + compute_bytes + (FLOAT32 if is_dense else 0)
    return chunk * per_logit + vocabulary * hidden * compute_bytes + tokens * hidden * compute_bytes


def cache_bytes(size: ModelSize, rows: int, tokens: int, setting: Setting) -> float:
    """Bytes of keys and values of `rows` rows of `tokens` tokens, and of the last position's logits of each, three times."""
    cache = 2 * size.layers * size.kv * setting.compute_bytes * rows * tokens
    return cache + rows * size.vocabulary * (setting.compute_bytes + 2 * FLOAT32)


def sampling_weight_bytes(size: ModelSize, setting: Setting, weight_bytes: int, gathers_to_sample: bool) -> float:
    """Bytes of weights that are made to sample: autocast's copies, gathered layers, or under ZeRO-3 the whole model."""
    if setting.engine == "zero3" and gathers_to_sample and setting.devices > 1:
        return size.parameters * setting.compute_bytes
    if setting.casts and weight_bytes == FLOAT32:
        return size.linear * setting.compute_bytes
    return in_flight_bytes(size, setting)


def reserve_bytes(devices: int) -> int:
    """Bytes of a device that no tensor has."""
    return ALLOCATOR + CUDA_CONTEXT + (NCCL if devices > 1 else 0)
