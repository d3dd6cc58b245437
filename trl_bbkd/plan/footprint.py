"""What a phase of a run takes on one device: each model by the formulas of [`memory`], and the largest of its moments."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..runs.held_models import HeldModel, Phase
from ..soft_targets.kernel import CHUNK_ELEMENTS
from . import memory
from .memory import ModelSize, Setting


BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "auto": 2, "None": 4}


@dataclass
class Footprint:
    """
    Bytes on one device.

    Args:
        kept (`dict[tuple[str, str], float]`):
            What stays from step to step, by model and part.
        moments (`dict[str, dict[str, float]]`):
            What is there at one moment and gone at the next, by the moment's name and part.
        reserve (`int`):
            What no tensor has.
    """

    kept: dict[tuple[str, str], float] = field(default_factory=dict)
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    reserve: int = 0

    @property
    def largest(self) -> str:
        """The largest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        """What PyTorch's allocator is asked for at the largest moment."""
        return sum(self.kept.values()) + sum(self.moments[self.largest].values())

    @property
    def total(self) -> float:
        return self.peak + self.reserve


def footprint(phase: Phase, sizes: Mapping[str, ModelSize], setting: Setting) -> Footprint:
    """
    Args:
        phase ([`~runs.held_models.Phase`]):
            The phase.
        sizes (`Mapping[str, ModelSize]`):
            Of each of its models, by name.
        setting ([`~memory.Setting`]):
            Devices and engine.
    """
    found = Footprint(reserve=memory.reserve_bytes(setting.devices))
    for model in phase.models:
        size = sizes[model.name]
        kept = kept_bytes(model, size, setting)
        found.kept |= {(model.name, part): value for part, value in kept.items() if value}
        if model.trains:
            found.moments |= learning(model, size, phase, setting)
        elif model.reads:
            found.moments[f"the {model.name} reads"] = reading(model, size, phase, setting)
    if phase.sampled and not phase.uses_vllm:
        (sampler,) = (model for model in phase.models if model.name == phase.sampler)
        size, weight_bytes = sizes[sampler.name], bytes_of(sampler, setting)
        found.moments[f"the {sampler.name} samples"] = {
            "weights made for it": memory.sampling_weight_bytes(size, setting, weight_bytes, phase.gathers_to_sample),
            "KV cache and logits": memory.cache_bytes(size, phase.sampled, phase.tokens, setting),
        }
    if phase.vllm_share:
        share = max(phase.vllm_share * setting.device_bytes, vllm_bytes(sizes[phase.sampler], phase, setting))
        if phase.vllm_sleeps:
            found.moments["vLLM samples"] = {"weights and KV cache": share}
        else:
            found.kept["vLLM", "weights and KV cache"] = share
    return found


def vllm_bytes(size: ModelSize, phase: Phase, setting: Setting) -> float:
    """The least that vLLM needs: its weights, and keys and values of one row."""
    weights = size.parameters * setting.compute_bytes / phase.vllm_divides
    return weights + memory.cache_bytes(size, 1, phase.tokens, setting)


def bytes_of(model: HeldModel, setting: Setting) -> int:
    """Bytes of a weight as it is loaded; DeepSpeed's block for bfloat16 turns the student's and the reference's into that."""
    loaded = BYTES.get(model.dtype.removeprefix("torch."), 4)
    return min(loaded, setting.compute_bytes) if setting.is_deepspeed and not model.has_own_engine else loaded


def kept_bytes(model: HeldModel, size: ModelSize, setting: Setting) -> dict[str, float]:
    """Bytes of a model that stay from step to step, by part."""
    weight_bytes = bytes_of(model, setting)
    learns_whole = model.trains and model.adapter is None
    found = {"frozen weights": 0.0, "weights": 0.0, "optimizer": 0.0, "gradient buckets": 0.0}
    if model.waits and setting.devices > 1 and setting.engine != "ddp":
        return found
    stays_whole = model.is_whole or model.waits
    # What is stored as uint8 FSDP2 leaves as it is
    is_left = setting.is_fsdp and model.is_4bit and model.storage_of_4bit == "uint8"
    is_shared_out = setting.shards_weights and not stays_whole and not is_left
    divisor = setting.parts if is_shared_out else 1
    # A model with an engine of its own is sharded by itself, shared weights included
    has_own_copy = model.has_own_engine and setting.devices > 1 and setting.shards_weights
    if not learns_whole and (model.stands_on is None or has_own_copy):
        found["frozen weights"] = memory.frozen_bytes(size, weight_bytes, model.is_4bit) / divisor
    if model.trains:
        trained, trained_bytes = trained_of(model, size), trained_bytes_of(model, setting)
        own = model.has_own_engine
        found["weights"] = memory.trained_weight_bytes(trained, setting, trained_bytes, own)
        found["optimizer"] = memory.optimizer_bytes(trained, setting, trained_bytes)
        found["gradient buckets"] = memory.bucket_bytes(trained, setting, trained_bytes)
    elif model.adapter is not None:
        found["weights"] = size.adapter * trained_bytes_of(model, setting) / divisor
    return found


def trained_of(model: HeldModel, size: ModelSize) -> int:
    """How many of a model's weights learn."""
    return size.parameters if model.adapter is None else size.adapter


def trained_bytes_of(model: HeldModel, setting: Setting) -> int:
    """Bytes of a weight that learns: PEFT makes adapters float32, and TRL bfloat16 those of a student in 4 bits."""
    if model.adapter is None:
        return bytes_of(model, setting)
    return 2 if model.is_4bit and not model.has_own_engine else memory.FLOAT32


def learning(model: HeldModel, size: ModelSize, phase: Phase, setting: Setting) -> dict[str, dict[str, float]]:
    """The moments at which a model learns."""
    trained, trained_bytes = trained_of(model, size), trained_bytes_of(model, setting)
    gradients = memory.gradient_bytes(size, trained, setting, trained_bytes, model.has_own_engine)
    tokens = model.rows * phase.tokens
    loss_bytes = loss_chunk(model, size, tokens, phase, setting)
    activations = memory.activation_bytes(
        size, tokens, setting, model.adapter is not None, bytes_of(model, setting), loss_bytes
    )
    found = {
        f"the {model.name} learns": {
            "gradients": gradients,
            "layers in flight": memory.in_flight_bytes(size, setting),
            "activations, loss chunk": activations,
        }
    }
    if model.has_own_engine:
        found[f"the {model.name}'s optimizer steps"] = {
            "gradients": gradients,
            "temporaries": memory.optimizer_temporaries(trained, setting),
        }
    return found


def reading(model: HeldModel, size: ModelSize, phase: Phase, setting: Setting) -> dict[str, float]:
    """What a frozen model takes while it reads."""
    tokens = model.rows * phase.tokens
    is_whole = model.is_whole or model.waits
    return {
        "layers in flight": 0.0 if is_whole else memory.in_flight_bytes(size, setting),
        "activations": memory.reading_bytes(size, tokens, setting, bytes_of(model, setting))
        + loss_chunk(model, size, tokens, phase, setting),
    }


def loss_chunk(model: HeldModel, size: ModelSize, tokens: int, phase: Phase, setting: Setting) -> float:
    """Bytes of a model's loss beside its hidden states; without an output layer over tokens there is next to nothing."""
    if model.kind != "text":
        return 0.0
    if phase.loss in ("sparse", "dense") and not model.has_own_engine:
        # Where there is memory to plan, there is a GPU
        chunk, is_dense = CHUNK_ELEMENTS["cuda"], phase.loss == "dense"
        own = memory.soft_target_bytes(tokens, size.hidden, size.vocabulary, chunk, setting.compute_bytes, is_dense)
        return own + (size.head * memory.FLOAT32 if model.trains and model.adapter is None else 0)
    return memory.log_prob_bytes(size, tokens, model.trains and model.adapter is None)
