"""
A package `vllm` for machines without one: a model of transformers under the names by which TRL and we call vLLM.

It has what makes a mistake show: the weights that are handed over are all that changes its own, sleeping loses them, and the
log-probabilities are those of its own model.
"""

import copy
import importlib
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.generation import vllm_client, vllm_generation
from trl.trainer import grpo_trainer

from trl_bbkd.evaluation.student import pad_rows


VERSION = "0.29.0"


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)


class Logprob(NamedTuple):
    logprob: float
    rank: int


class Completion(NamedTuple):
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


class LoRARequest(NamedTuple):
    name: str
    number: int
    path: str


class RequestOutput(NamedTuple):
    prompt_token_ids: list[int]
    outputs: list[Completion]


class Weights(torch.nn.Module):
    """vLLM's model: takes weights by name."""

    def __init__(self, path: str):
        super().__init__()
        config = AutoConfig.from_pretrained(path)
        # As if `from_pretrained` were not there, which sharding engines change
        self.model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
        self.model.load_state_dict(load_file(Path(path, "model.safetensors")), strict=False)
        self.model.tie_weights()
        self.received: list[str] = []

    @torch.no_grad()
    def load_weights(self, weights) -> None:
        own = dict(self.model.named_parameters())
        for name, value in weights:
            assert not isinstance(value, DTensor) and value.shape == own[name].shape, (name, value.shape)
            own[name].copy_(value)
            self.received.append(name)


class LLM:
    """
    The engine. `LLM.made` are those of this process; `LLM.drift` says of each sample how far a reported log-probability of
    its tokens is off.
    """

    made: list["LLM"] = []
    drift: Callable[[list[int]], float] = staticmethod(lambda ids: 0.0)

    def __init__(self, model: str, seed: int = 0, enable_sleep_mode: bool = False, max_model_len=None, **settings):
        self.path, self.settings = model, settings
        self.weights = Weights(model)
        self.ends = GenerationConfig.from_pretrained(model).eos_token_id
        self.ends = self.ends if isinstance(self.ends, list) else [self.ends]
        self.noise = torch.Generator().manual_seed(seed)
        self.asleep: set[str] = set()
        self.sampled: list[Completion] = []
        runner = SimpleNamespace(model=self.weights)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(
            model_executor=executor, model_config=SimpleNamespace(max_model_len=max_model_len or 512)
        )
        LLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert level == 2
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for parameter in self.weights.parameters():
                parameter.fill_(float("nan"))

    def wake_up(self, tags: list[str]) -> None:
        self.asleep -= set(tags)

    def reset_prefix_cache(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, use_tqdm=False, lora_request=None) -> list[RequestOutput]:
        assert not self.asleep, self.asleep
        if lora_request is not None:
            assert self.settings["enable_lora"]
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.weights.model), lora_request.path)
            self.weights.model = adapted.merge_and_unload()
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        requests = [
            (ids, params, number) for ids, params in zip(prompts, each, strict=True) for number in range(params.n)
        ]
        completions = iter(self._sample(requests))
        return [
            RequestOutput(ids, [next(completions) for _ in range(params.n)])
            for ids, params in zip(prompts, each, strict=True)
        ]

    def _sample(self, requests: list) -> list[Completion]:
        rows = [list(ids) for ids, _, _ in requests]
        noises = [
            self.noise if params.seed is None else torch.Generator().manual_seed(params.seed + number)
            for _, params, number in requests
        ]
        found: list[tuple[list, list]] = [([], []) for _ in requests]
        going = list(range(len(requests)))
        while going:
            ids, mask = pad_rows([rows[row] for row in going], 0, "cpu", side="left")
            logits = self.weights.model(ids, attention_mask=mask).logits[:, -1].float()
            for row, values in zip(list(going), logits, strict=True):
                params = requests[row][1]
                log_probs = processed(values, params)
                token = int(log_probs.argmax())
                if params.temperature > 0:
                    token = int(torch.multinomial(log_probs.exp(), 1, generator=noises[row]))
                rows[row].append(token)
                found[row][0].append(token)
                found[row][1].append(float(log_probs[token]))
                ends = {*self.ends, *params.stop_token_ids}
                if token in ends or len(found[row][0]) == params.max_tokens:
                    going.remove(row)
        completions = []
        for (ids, values), (_, params, _) in zip(found, requests, strict=True):
            off = LLM.drift(ids)
            reported = [{token: Logprob(value - off, 1)} for token, value in zip(ids, values, strict=True)]
            completions.append(Completion(ids, None if params.logprobs is None else reported))
        self.sampled += completions
        return completions


def processed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Log-probabilities of the distribution that is sampled from."""
    log_probs = (logits / (params.temperature or 1.0)).log_softmax(-1)
    if params.top_p < 1:
        probs, order = log_probs.exp().sort(descending=True)
        log_probs[order[probs.cumsum(0) - probs >= params.top_p]] = -torch.inf
        log_probs = log_probs.log_softmax(-1)
    return log_probs


# Weights on their way to a server. vLLM sends them with NCCL, which only GPUs have; here the bytes go through a socket.


def open_trainer_endpoint(init_info: dict) -> SimpleNamespace:
    with socket.create_server((init_info["master_address"], init_info["master_port"])) as listening:
        connection, _ = listening.accept()
    return SimpleNamespace(connection=connection, group=SimpleNamespace(store=None, socket=None))


def send_weights(iterator, group: SimpleNamespace, src: int, post_iter_func: Callable) -> None:
    for item in iterator:
        group.connection.sendall(post_iter_func(item).detach().contiguous().view(torch.uint8).numpy().tobytes())


def connect_to_trainer(init_info: dict) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection((init_info["master_address"], init_info["master_port"]))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("the trainer does not listen")


MODULES = {
    "vllm": {"LLM": LLM, "RequestOutput": RequestOutput, "SamplingParams": SamplingParams, "__version__": VERSION},
    "vllm.sampling_params": {"StructuredOutputsParams": dict},
    "vllm.lora": {},
    "vllm.lora.request": {"LoRARequest": LoRARequest},
    "vllm.utils": {},
    "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
    "vllm.distributed": {},
    "vllm.distributed.weight_transfer": {},
    "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": open_trainer_endpoint},
    "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": send_weights},
}


def install() -> None:
    """For the rest of a process, which must be one of its own: TRL finds vLLM where it looks for it."""
    for name, contents in MODULES.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
        vars(sys.modules[name]).update(contents)
    importlib.reload(vllm_client)
    importlib.reload(vllm_generation)
    grpo_trainer.VLLMGeneration = vllm_generation.VLLMGeneration
    init_communicator = vllm_client.VLLMClient.init_communicator
    # Which refuses devices that have no NCCL
    vllm_client.VLLMClient.init_communicator = lambda self, device: init_communicator(self, "cuda")
