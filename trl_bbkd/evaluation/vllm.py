"""A student's answers from the vLLM that its trainer samples with."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from trl.generation.vllm_generation import VLLMGeneration

from ..host._compat import vllm_with_weights_of
from .bars import progress_bar_of
from .processes import in_order, place


REQUESTS_AT_ONCE = 64  # as TRL's client, whose connections are as many


class TrainersVLLM:
    """
    What the report samples with where the trainer has vLLM, on its GPUs or on a server: of each student in turn, whose
    weights it is given.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            The trainer's `vllm_generation`.
    """

    def __init__(self, generation: VLLMGeneration):
        self.generation = generation

    def outlive_the_trainer(self) -> None:
        """Hold on to nothing of the trainer but vLLM, so that its models and optimizers can go."""
        self.generation.model = None
        self.generation.accelerator = PartialState()

    @contextlib.contextmanager
    def holding(self, model: PreTrainedModel) -> Iterator["TrainersVLLM"]:
        """Within the block a model's answers can be sampled. All processes must take part."""
        with vllm_with_weights_of(model, self.generation):
            yield self

    def sample(
        self,
        prompt_ids: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        num_samples: int,
        end_ids: list[int],
        seed: int,
        progress_bar: str | None = None,
    ) -> list[list[list[int]]]:
        """
        Token ids, as those of [`~evaluation.student.generate_completion_ids`], whose arguments these are. Every process gets
        all of them.
        """
        # A sample's number is added to its prompt's seed
        seeds = [seed + number * num_samples for number in range(len(prompt_ids))]
        settings = {"n": num_samples, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        sample = self._from_server if self.generation.mode == "server" else self._from_devices
        return sample(prompt_ids, seeds, settings, end_ids, progress_bar)

    def _from_server(
        self,
        prompt_ids: list[list[int]],
        seeds: list[int],
        settings: dict[str, Any],
        end_ids: list[int],
        progress_bar: str | None,
    ) -> list[list[list[int]]]:
        def ask(ids: list[int], seed: int) -> list[list[int]]:
            more = {"seed": seed, "stop_token_ids": end_ids}
            client = self.generation.vllm_client
            return client.generate([ids], logprobs=None, generation_kwargs=more, **settings)["completion_ids"]

        found: list[Any] = [None]
        if place()[0] == 0:
            bar = progress_bar_of(len(prompt_ids), progress_bar, "prompt")
            with bar, ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
                answers = []
                for answer in threads.map(ask, prompt_ids, seeds):
                    answers.append(answer)
                    bar.update()
            found = [answers]
        if place()[1] > 1:
            broadcast_object_list(found)
        return found[0]

    def _from_devices(
        self,
        prompt_ids: list[list[int]],
        seeds: list[int],
        settings: dict[str, Any],
        end_ids: list[int],
        progress_bar: str | None,
    ) -> list[list[list[int]]]:
        from vllm import SamplingParams

        (rank, processes), divides = place(), self.generation.tensor_parallel_size
        # Processes that share an engine ask it for the same
        own = range(len(prompt_ids))[rank // divides :: processes // divides]
        found = []
        if own:
            found = self.generation.llm.generate(
                [{"prompt_token_ids": prompt_ids[number]} for number in own],
                [SamplingParams(seed=seeds[number], stop_token_ids=end_ids, **settings) for number in own],
                # vLLM's own bar, of this process's part
                use_tqdm=progress_bar is not None and rank == 0,
            )
        ids = [[list(sample.token_ids) for sample in output.outputs] for output in found]
        return in_order(dict(zip(own, ids, strict=True)))
