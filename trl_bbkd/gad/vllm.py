"""What GAD adds to TRL's sampling with vLLM."""

from importlib.util import find_spec
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration

from ..host._compat import hand_over_and_restore
from ..host.typed import MixinBase
from .config import GADConfig


# Of the sampling settings, what leaves part of the distribution out or bends it, and the values that do not
UNBENT = {"top_p": (1.0,), "top_k": (None, 0, -1), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


class SampledWithVLLM(MixinBase):
    """The part of [`GADTrainer`] that keeps vLLM's copy of the student right, and measures how far it is from the student."""

    use_vllm: bool
    vllm_generation: VLLMGeneration
    vllm_importance_sampling_mode: str

    def _start_vllm(self) -> None:
        if self.use_vllm:
            hand_over_and_restore(self.vllm_generation)

    def train(self, *args, **kwargs):
        if self.use_vllm:
            # A run before this one has left the weights of its last steps there, or the report those of another student
            self._last_loaded_step = -1
        return super().train(*args, **kwargs)

    def _generate_single_turn(self, *args, **kwargs):
        has_weights = self.use_vllm and self.model.training and self._last_loaded_step >= 0
        if has_weights and self.state.global_step <= self._discriminator_only_steps:
            # The student stands still while the discriminator learns alone
            self._last_loaded_step = self.state.global_step
        return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "importance_sampling_ratio" in output and self.vllm_importance_sampling_mode.endswith("_mask"):
            counts = masked_counts(output["importance_sampling_ratio"], output["completion_mask"])
            masked, all_of_them = self.accelerator.reduce(counts).tolist()
            metrics = {"sampling/masked_share": masked / max(all_of_them, 1)}
            self._log_metrics("train" if self.model.training else "eval", metrics)
        return output


def masked_counts(ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    How much of the samples the importance-sampling correction takes out of the student's loss.

    Args:
        ratio (`torch.Tensor`):
            The correction: of shape `(B, T)`, one a token, or `(B, 1)`, one a sample. It is 0 where it masks.
        mask (`torch.Tensor`):
            The samples' tokens, of shape `(B, T)`.

    Returns:
        `torch.Tensor`: two numbers, what is masked and what there is, in tokens or samples.
    """
    is_counted = mask.bool() if ratio.shape == mask.shape else torch.ones_like(ratio, dtype=torch.bool)
    return torch.stack([((ratio == 0) & is_counted).sum(), is_counted.sum()]).float()


def check_vllm(args: GADConfig) -> None:
    """
    Refuse, before any model is loaded, a sampling with vLLM that cannot work or would teach something else.

    Raises:
        ValueError: it is not installed; its processes cannot be divided; or its log-probabilities would not be those of the
            student.
    """
    if not args.use_vllm:
        return
    if find_spec("vllm") is None:
        raise ValueError(
            'use_vllm=True needs vllm, which is not installed here: pip install "trl-bbkd[vllm]". Or leave use_vllm out.'
        )
    divides = args.vllm_tensor_parallel_size
    if args.vllm_mode == "colocate" and args.world_size % divides:
        raise ValueError(
            f"vllm_tensor_parallel_size={divides} does not divide the {args.world_size} processes of this run. Take a divisor, "
            "or vllm_mode='server'."
        )
    if not args.vllm_importance_sampling_correction:
        return
    for name, unbent in UNBENT.items():
        value = getattr(args, name)
        if value not in unbent:
            raise ValueError(
                f"{name}={value} biases the importance-sampling correction: vLLM's log-probabilities are then those of another "
                f"distribution than the student's. Leave {name} out and sample by temperature alone, or set "
                "vllm_importance_sampling_correction=False."
            )
