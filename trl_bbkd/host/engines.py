"""
How a model that is trained beside the student is wrapped, stepped, saved and loaded: whole on every process, or sharded as
the student is.
"""

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from ._compat import shard_by_layers


OPTIMIZER_NAME = "optimizer.safetensors"
ZERO_FOLDER = "zero"
PARTS_FOLDER = "parts"


class Engine:
    """
    A model on one device, or whole on every process with averaged gradients (DDP).

    The optimizer is deliberately not prepared by accelerate: a prepared one does nothing whenever the student's
    gradients are not being synchronised.

    Args:
        module (`torch.nn.Module`):
            The model to train. What it holds in `backbone` is a transformers model; its other parts are small heads.
        accelerator ([`~accelerate.Accelerator`]):
            The student trainer's accelerator.
        learning_rate (`float`), weight_decay (`float`):
            Of AdamW.
        max_grad_norm (`float`):
            Gradients are clipped at this norm.
    """

    has_equal_chunks = False  # whether every process must run the model equally often
    model: Any  # what wraps the module
    optimizer: Any

    def __init__(
        self,
        module: nn.Module,
        accelerator: Accelerator,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
    ):
        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm
        self.model = self._wrap(module)
        self.module = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)

    def _wrap(self, module: nn.Module) -> nn.Module:
        return self.accelerator.prepare_model(module)

    def count_chunks(self, own: int) -> int:
        """How many times this process has to run the model for its `own` chunks, so that no other one waits for it."""
        if not self.has_equal_chunks:
            return own
        counts = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
        return int(counts.max())

    @contextlib.contextmanager
    def chunk(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one chunk of the batch that the next step is taken on."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of the steps from now on; under ZeRO before the last chunk."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """Clip and take an optimizer step. Returns the gradient norm before clipping, over all processes."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return whole(norm).item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights of the module, whole, on the main process. Every process takes part, and the others get nothing."""
        return whole_state(self.module.state_dict(), self.accelerator)

    def save(self, folder: Path, save_weights: Callable[[], None]) -> None:
        """
        Write all that a resumed run needs. Every process takes part.

        Args:
            folder (`Path`):
                Where to write the optimizer's state.
            save_weights (`Callable`):
                Writes the weights, whole, and what they are of. Every process calls it.
        """
        save_weights()
        state = whole_state(optimizer_tensors(self.optimizer), self.accelerator)
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / OPTIMIZER_NAME)

    def load(self, folder: Path, load_weights: Callable[[], None]) -> None:
        """
        Restore what a run left, on whatever number of processes.

        Args:
            folder (`Path`):
                Where [`~Engine.save`] wrote.
            load_weights (`Callable`):
                Writes the weights into the module, in place, sharded as it is. Every process calls it.
        """
        load_weights()
        restore_optimizer(self.optimizer, load_file(folder / OPTIMIZER_NAME))


class ShardedEngine(Engine):
    """
    A model sharded by FSDP2 with the student's plugin: the backbone by accelerate's rule, the heads as units of their own,
    which stay in float32.
    """

    has_equal_chunks = True

    def _wrap(self, module: nn.Module) -> nn.Module:
        plugin, mesh = self.accelerator.state.fsdp_plugin, getattr(self.accelerator, "torch_device_mesh", None)
        broadcast(module, self.accelerator.device)
        shard_by_layers(self.accelerator, module.get_submodule("backbone"))
        settings = {
            "offload_policy": plugin.cpu_offload,
            "reshard_after_forward": False,
            "mp_policy": MixedPrecisionPolicy(),
            "mesh": None if mesh is None else mesh[tuple(self.accelerator.parallelism_config.fsdp_dim_names)],
        }
        for name, head in module.named_children():
            if name != "backbone":
                fully_shard(head, **settings)
        fully_shard(module, **settings)
        return module

    @contextlib.contextmanager
    def chunk(self, is_last: bool) -> Iterator[None]:
        # Every chunk's gradient is reduced and scattered: without, each process would keep the whole one
        yield

    @property
    def _saves_parts(self) -> bool:
        return self.accelerator.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT

    def _trained_weights(self) -> dict[str, torch.Tensor]:
        parameters = self.module.named_parameters()
        return {f"weights.{name}": value.detach() for name, value in parameters if value.requires_grad}

    def save(self, folder: Path, save_weights: Callable[[], None]) -> None:
        if not self._saves_parts:
            super().save(folder, save_weights)
            return
        parts = folder / PARTS_FOLDER
        if self.accelerator.is_main_process:
            # All files there are read, also those of more processes that wrote the same checkpoint before
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        state = {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        writer = distributed_checkpoint.HuggingFaceStorageWriter(str(parts), save_distributed=True)
        distributed_checkpoint.save(self._trained_weights() | state, storage_writer=writer)

    def load(self, folder: Path, load_weights: Callable[[], None]) -> None:
        if not self._saves_parts:
            super().load(folder, load_weights)
            return
        reader = distributed_checkpoint.HuggingFaceStorageReader(str(folder / PARTS_FOLDER))
        names = [name.removeprefix("optimizer.") for name in reader.read_metadata().state_dict_metadata]
        state = blank_optimizer_tensors(self.optimizer, [name for name in names if not name.startswith("weights.")])
        found = self._trained_weights() | {f"optimizer.{name}": value for name, value in state.items()}
        # In place, each process its own parts
        distributed_checkpoint.load(found, storage_reader=reader)
        restore_optimizer(self.optimizer, state)


class ZeroEngine(Engine):
    """
    A model in a DeepSpeed engine of its own, with the ZeRO settings of the student's.

    Its optimizer's state is what DeepSpeed writes: one file a process, which the same number of processes reads again.
    """

    has_equal_chunks = True

    def __init__(self, module: nn.Module, accelerator: Accelerator, *, learning_rate, weight_decay, max_grad_norm):
        import deepspeed

        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm
        self.module = module.to(accelerator.device)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._settings(accelerator.state.deepspeed_plugin)
        )

    @property
    def is_partitioned(self) -> bool:
        return self.model.zero_optimization_stage() == 3

    def _settings(self, plugin) -> dict:
        settings = copy.deepcopy(plugin.deepspeed_config)
        # A block for bf16 would cast the heads as well
        for key in ("optimizer", "scheduler", "fp16", "bf16", "train_batch_size"):
            settings.pop(key, None)
        return settings | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    @contextlib.contextmanager
    def chunk(self, is_last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(is_last)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        with torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)
        # Counts the chunk; at the boundary it clips, steps and zeroes the gradients
        self.model.step()

    def step(self) -> float:
        return float(self.model.get_global_grad_norm())

    def state_dict(self) -> dict[str, torch.Tensor]:
        if not self.is_partitioned:
            return whole_state(self.module.state_dict(), self.accelerator)
        state = self.model._zero3_consolidated_16bit_state_dict()
        return {name: value.cpu() for name, value in (state or {}).items()}

    def save(self, folder: Path, save_weights: Callable[[], None]) -> None:
        save_weights()
        self.model.save_checkpoint(str(folder), tag=ZERO_FOLDER)

    def load(self, folder: Path, load_weights: Callable[[], None]) -> None:
        # The weights are in DeepSpeed's files, in full precision
        self.model.load_checkpoint(str(folder), tag=ZERO_FOLDER)


def make_engine(module: nn.Module, accelerator: Accelerator, **settings) -> Engine:
    """The engine that suits how the student is trained, with the arguments of [`Engine`]."""
    if accelerator.is_fsdp2:
        return ShardedEngine(module, accelerator, **settings)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroEngine(module, accelerator, **settings)
    return Engine(module, accelerator, **settings)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part. Every process takes part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """
    A parameter that is read outside of its module's forward, whole. Where FSDP2 has it in parts, the mean of the processes'
    gradients comes back, as from its own backward pass. Every process takes part.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    found = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if found.requires_grad:
        found.register_hook(lambda gradient: gradient / mesh.size())
    return found


def whole_state(state: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Named tensors, whole, on the main process; one at a time, so that no process needs room for all of them twice."""
    found = {}
    for name, value in state.items():
        is_part = isinstance(value, DTensor)
        value = whole(value.detach())
        if accelerator.is_main_process:
            found[name] = (value.cpu() if is_part else value).contiguous()
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of each parameter, in their order: `{"0.exp_avg": ..., "0.step": ..., "1.exp_avg": ...}`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def blank_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors for what [`optimizer_tensors`] has by these names, to be written over, each sharded as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        name: torch.zeros(()) if name.endswith(".step") else torch.zeros_like(parameters[int(name.split(".")[0])])
        for name in names
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give an optimizer over the same parameters the state that [`optimizer_tensors`] read, whole on every process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if name == "step":
            # torch keeps the count on the CPU
            optimizer.state[parameter][name] = value.cpu()
        else:
            optimizer.state[parameter][name] = part_of(value, parameter)


def begin_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """
    Give the optimizer of a sharded model, if it has taken no step yet, the state that it begins with. PyTorch does so before
    it saves one, by a step that changes no weight; but Adam counts it.
    """
    if optimizer.state:
        return
    get_optimizer_state_dict(model, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has taken it apart."""
    return getattr(parameter, "ds_shape", parameter.shape)


def part_of(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device of `like` and sharded as that is. Every process takes part."""
    value = value.to(like.device)
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


@torch.no_grad()
def copy_into(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """
    Overwrite, in place, each tensor of `targets` that `values` names. A part is filled from the whole, and a tensor of
    DeepSpeed's from the main process's.
    """
    for name, value in values.items():
        if name not in targets:
            raise ValueError(
                f"There is no {name} in the model that weights are loaded into: they are another model's."
            )
        target = targets[name]
        with gathered([target]):
            target.copy_(part_of(value.reshape(target.shape), target))


def copy_model(source: nn.Module, target: nn.Module) -> None:
    """Overwrite the parameters and buffers of `target`, in place, with those of a model of the same architecture."""
    values = dict(source.named_parameters()) | dict(source.named_buffers())
    targets = dict(target.named_parameters()) | dict(target.named_buffers())
    for name, value in targets.items():
        with gathered([values[name]]):
            copy_into({name: value}, {name: values[name].detach()})


@contextlib.contextmanager
def gathered(parameters: list[torch.Tensor], is_written: bool = True) -> Iterator[None]:
    """Within the block the parameters that ZeRO-3 has partitioned are whole; what the main process writes to them is kept."""
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if is_written else None):
        yield


@torch.no_grad()
def broadcast(module: nn.Module, device: torch.device) -> None:
    """
    Give every process the main one's weights: sharding takes each part from another process. Each goes by way of the device
    that processes talk through, since NCCL sends nothing that is on a CPU.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        sent = tensor.data.to(device)
        torch.distributed.broadcast(sent, src=0)
        tensor.data.copy_(sent)
