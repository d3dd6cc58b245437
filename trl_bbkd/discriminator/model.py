import copy
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from ..host._compat import add_fused_lm_head, disable_dropout
from ..host.engines import copy_into, whole_shape
from ..host.model_files import read_adapter
from ..host.preflight import refuse_adapted_head
from .embeddings import match_embeddings


CONFIG_NAME = "discriminator_config.json"
HEADS_NAME = "heads.safetensors"
BACKBONE_NAME = "backbone"


class DiscriminatorOutput(NamedTuple):
    """
    What a discriminator says of `B` sequences of `T` tokens.

    Parameters:
        scores (`torch.Tensor` of shape `(B,)`):
            Scores, in float32.
        token_scores (`torch.Tensor` of shape `(B, T)`, *optional*):
            Likelihood head only: what each token adds to the score; zero outside the response.
        log_likelihoods (`torch.Tensor` of shape `(B,)`, *optional*):
            Likelihood head only: `log p_D(y | x)` of each response, in nats.
    """

    scores: torch.Tensor
    token_scores: torch.Tensor | None = None
    log_likelihoods: torch.Tensor | None = None


class Discriminator(nn.Module):
    """
    Scores responses: the higher, the more the response looks like the teacher's (`D(x, y)` of arXiv 2511.10643).

    Heads are float32 whatever the backbone's dtype, since groups of samples often differ by less than bfloat16 resolves.
    Dropout is off: the same text always gets the same score.

    Args:
        backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Decoder. Without LM head for `head="scalar"`, a causal language model for `head="likelihood"`.
        head (`str`):
            `"scalar"`: linear head at the last token of the sequence. `"likelihood"`: a learned scale times the
            backbone's log-likelihood of the response, plus the linear head, which then starts at zero.
        likelihood_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` of the token log-probabilities over the response.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the linear head's initial weights.

    Raises:
        ValueError: If the likelihood head's backbone has an adapter on its output layer.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        head: str,
        likelihood_reduction: str = "sum",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.likelihood_reduction = likelihood_reduction
        config = backbone.config.get_text_config()
        self.score_head = nn.Linear(config.hidden_size, 1, dtype=torch.float32, device=backbone.device)
        disable_dropout(backbone)
        with torch.no_grad():
            self.score_head.bias.zero_()
            if head == "likelihood":
                self.score_head.weight.zero_()
                self.likelihood_scale = nn.Parameter(torch.ones(1, dtype=torch.float32, device=backbone.device))
                causal_lm = self._transformer()
                refuse_adapted_head(causal_lm, "discriminator")
                add_fused_lm_head(causal_lm)
                causal_lm.base_model.register_forward_hook(self._keep_last_hidden_state)
            else:
                generator = torch.Generator().manual_seed(seed)
                std = getattr(config, "initializer_range", 0.02)
                self.score_head.weight.copy_(torch.randn(1, config.hidden_size, generator=generator) * std)

    def _transformer(self) -> PreTrainedModel:
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    def _keep_last_hidden_state(self, module, args, output):
        self._last_hidden_state = output.last_hidden_state

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
    ) -> DiscriminatorOutput:
        """
        Score a right-padded batch of `[prompt, response]` sequences. The padding has no influence.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`):
                1 on tokens, 0 on padding.
            response_mask (`torch.Tensor` of shape `(B, T)`):
                1 on the response's tokens, its EOS included.

        Returns:
            [`DiscriminatorOutput`]
        """
        rows, last_token = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(dim=1) - 1
        if self.head == "scalar":
            hidden = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
            return DiscriminatorOutput(self._head_scores(hidden[rows, last_token]))

        labels = input_ids.masked_fill(response_mask == 0, -100)
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
        # The first token of a sequence is not predicted
        log_probs = F.pad(output.log_probs.float(), (1, 0))
        evidence = log_probs
        if self.likelihood_reduction == "mean":
            evidence = evidence / response_mask.sum(dim=1, keepdim=True)
        head_scores = self._head_scores(self._last_hidden_state[rows, last_token])
        token_scores = self.likelihood_scale * evidence
        token_scores = token_scores.index_put((rows, last_token), head_scores, accumulate=True)
        return DiscriminatorOutput(token_scores.sum(dim=1), token_scores, log_probs.sum(dim=1))

    def _head_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)

    def save_pretrained(self, directory: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """
        Write `discriminator_config.json`, the heads and the backbone (safetensors) to `directory`.

        Args:
            directory (`str` or `Path`):
                A folder, made if it is not there.
            weights (`dict[str, torch.Tensor]`, *optional*):
                The module's state, where its own tensors are parts of it. By default, its own.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if weights is None else weights
        prefix = f"{BACKBONE_NAME}."
        backbone = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        self.backbone.save_pretrained(directory / BACKBONE_NAME, state_dict=backbone)
        heads = {name: value.contiguous() for name, value in weights.items() if not name.startswith(prefix)}
        save_file(heads, directory / HEADS_NAME)
        config = {
            "head": self.head,
            "likelihood_reduction": self.likelihood_reduction,
            "is_adapter": isinstance(self.backbone, PeftModel),
            "num_embeddings": whole_shape(self.backbone.get_input_embeddings().weight)[0],
        }
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path, **model_init_kwargs) -> "Discriminator":
        """
        Load what [`~Discriminator.save_pretrained`] wrote.

        Args:
            directory (`str` or `Path`):
                A run's `discriminator/` folder.
            **model_init_kwargs:
                Passed to `from_pretrained` of the backbone, e.g. `dtype`.

        Raises:
            FileNotFoundError: If `directory` holds no discriminator.
        """
        directory = Path(directory)
        if not (directory / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{directory} holds no discriminator ({CONFIG_NAME} is missing). Pass the `discriminator/` folder of "
                "a run or of a checkpoint."
            )
        config = json.loads((directory / CONFIG_NAME).read_text())
        backbone_path = str(directory / BACKBONE_NAME)
        model_class = AutoModelForCausalLM if config["head"] == "likelihood" else AutoModel
        if config["is_adapter"]:
            base_path, _ = find_backbone(directory)
            base = model_class.from_pretrained(base_path, **model_init_kwargs)
            if "num_embeddings" in config:
                # Beside a student with added tokens; their embeddings are saved with the adapter
                base.resize_token_embeddings(config["num_embeddings"], mean_resizing=False)
            backbone = PeftModel.from_pretrained(base, backbone_path, is_trainable=True)
        else:
            backbone = model_class.from_pretrained(backbone_path, **model_init_kwargs)
        discriminator = cls(backbone, config["head"], config["likelihood_reduction"])
        discriminator._load_heads(directory)
        return discriminator

    def load_weights(self, directory: str | Path) -> None:
        """Overwrite the weights with those [`~Discriminator.save_pretrained`] wrote for the same architecture."""
        backbone_path = Path(directory) / BACKBONE_NAME
        if isinstance(self.backbone, PeftModel):
            copy_into(self.backbone.state_dict(), read_adapter(self.backbone, backbone_path))
        else:
            saved = type(self.backbone).from_pretrained(backbone_path, dtype=self.backbone.dtype)
            copy_into(self.backbone.state_dict(), saved.state_dict())
        self._load_heads(directory)

    def _load_heads(self, directory: str | Path) -> None:
        copy_into(self.state_dict(), load_file(Path(directory) / HEADS_NAME))


def find_backbone(path: str | Path) -> tuple[str, bool]:
    """
    Tell where the pretrained weights of a discriminator are.

    Args:
        path (`str` or `Path`):
            A saved discriminator's folder, or a checkpoint to start from: a local path or Hub id.

    Returns:
        `tuple[str, bool]`: Path or Hub id of the model, and whether a saved adapter goes on top of it.
    """
    if not (Path(path) / CONFIG_NAME).is_file():
        return str(path), False
    backbone_path = str(Path(path) / BACKBONE_NAME)
    if json.loads((Path(path) / CONFIG_NAME).read_text())["is_adapter"]:
        return PeftConfig.from_pretrained(backbone_path).base_model_name_or_path, True
    return backbone_path, False


def build_discriminator(
    model: "str | PreTrainedModel | Discriminator",
    head: str,
    likelihood_reduction: str = "sum",
    peft_config: PeftConfig | None = None,
    seed: int = 0,
    student: PreTrainedModel | None = None,
    **model_init_kwargs,
) -> Discriminator:
    """
    Give a checkpoint or a loaded model the head of a discriminator.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`Discriminator`]):
            Where the discriminator starts: a local path or Hub id, a loaded model (without LM head for the scalar
            head, a causal language model for the likelihood head), or a discriminator, taken as it is. A path to a
            saved discriminator is continued, head included.
        head (`str`), likelihood_reduction (`str`), seed (`int`):
            As in [`Discriminator`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Train an adapter on the frozen model instead of the model.
        student ([`~transformers.PreTrainedModel`], *optional*):
            The student whose checkpoint `model` is, which may have got more tokens since.
        **model_init_kwargs:
            Passed to `from_pretrained` when `model` is a path.

    Raises:
        ValueError: If a loaded model has no LM head for the likelihood head, or an adapter on it; if a saved
            discriminator's head is not the one asked for.
    """
    if isinstance(model, str) and (Path(model) / CONFIG_NAME).is_file():
        model = Discriminator.from_pretrained(model, **model_init_kwargs)
    if isinstance(model, Discriminator):
        if model.head != head:
            raise ValueError(f"The discriminator has a {model.head!r} head, but discriminator_head is {head!r}.")
        if head == "likelihood" and model.likelihood_reduction != likelihood_reduction:
            raise ValueError(
                f"The discriminator takes the {model.likelihood_reduction} over the response tokens, but "
                f"discriminator_likelihood_reduction is {likelihood_reduction!r}."
            )
        return model
    if isinstance(model, str):
        model_class = AutoModelForCausalLM if head == "likelihood" else AutoModel
        model_init_kwargs.setdefault("dtype", torch.float32)
        model = model_class.from_pretrained(model, **model_init_kwargs)
        if student is not None:
            match_embeddings(model, student)
    if head == "likelihood" and model.get_output_embeddings() is None:
        raise ValueError(
            f"discriminator_head='likelihood' needs a causal language model, got {type(model).__name__}, which has no "
            "LM head."
        )
    if peft_config is not None:
        # PEFT's task classes expect heads that a discriminator does not have
        peft_config = copy.copy(peft_config)
        peft_config.task_type = None
        model = get_peft_model(model, peft_config)
    return Discriminator(model, head, likelihood_reduction, seed)


def collate_responses(
    prompt_ids: list[list[int]], response_ids: list[list[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """
    Join prompts and responses into one right-padded batch.

    Args:
        prompt_ids (`list[list[int]]`), response_ids (`list[list[int]]`):
            `B` prompts and their responses. A response ends in EOS if and only if it was not truncated.
        pad_token_id (`int`):
            Fills the rest; may equal EOS, since lengths and not ids tell where a response ends.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the tensors go.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `response_mask`, each of shape `(B, T)`.
    """
    width = max(len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True))
    input_ids = torch.full((len(prompt_ids), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        response_mask[row, len(prompt) : end] = 1
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "response_mask": response_mask.to(device),
    }
