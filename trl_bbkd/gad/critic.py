import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..discriminator.embeddings import match_embeddings
from ..host._compat import disable_dropout
from ..host.engines import copy_into, make_engine
from .advantages import clipped_value_loss
from .config import GADConfig


CRITIC_NAME = "critic.safetensors"


class Critic(nn.Module):
    """
    Value model: what reward is still to come, read before each token of a response.

    Args:
        backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Decoder without LM head.
        trains_backbone (`bool`):
            Whether the backbone is the critic's own. The trunk of the student is only read: its features reach the head
            without gradients, and its weights are not the critic's parameters.
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, trains_backbone: bool):
        super().__init__()
        self.trains_backbone = trains_backbone
        if trains_backbone:
            disable_dropout(backbone)
            self.backbone = backbone
        else:
            # Past nn.Module's own assignment, which would make the student's weights the critic's
            self.__dict__["backbone"] = backbone
        hidden_size = backbone.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden_size, 1, dtype=torch.float32, device=backbone.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_response_tokens: int) -> torch.Tensor:
        """
        Values of the states before each of the last `num_response_tokens` tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(B, P + T)`), attention_mask (`torch.Tensor` of shape `(B, P + T)`):
                Left-padded prompts, right-padded responses.
            num_response_tokens (`int`):
                `T`.

        Returns:
            `torch.Tensor` of shape `(B, T)`, float32.
        """
        # The student's own dropout must not reach the values read from its trunk
        was_training = self.backbone.training
        self.backbone.train(was_training and self.trains_backbone)
        with torch.set_grad_enabled(self.trains_backbone and torch.is_grad_enabled()):
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        self.backbone.train(was_training)
        hidden = output.last_hidden_state[:, -num_response_tokens - 1 : -1]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)


def build_critic(
    kind: str, student: PreTrainedModel, student_path: str, peft_config: PeftConfig | None, **model_init_kwargs
) -> Critic:
    """
    Build the critic that `GADConfig.critic` asks for.

    Args:
        kind (`str`):
            `"copy"`: the student's checkpoint, loaded once more and trained. `"trunk"`: a head on the student's trunk.
        student ([`~transformers.PreTrainedModel`]):
            The student, without its PEFT wrapper (adapters stay active).
        student_path (`str`):
            Its checkpoint.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Train an adapter on the frozen copy instead of the copy.
        **model_init_kwargs:
            Passed to `from_pretrained`.
    """
    if kind == "trunk":
        return Critic(student.base_model, trains_backbone=False)
    backbone = AutoModel.from_pretrained(student_path, **{"dtype": torch.float32, **model_init_kwargs})
    match_embeddings(backbone, student)
    if peft_config is not None:
        # PEFT's task classes expect heads that a critic does not have
        peft_config = copy.copy(peft_config)
        peft_config.task_type = None
        backbone = get_peft_model(backbone, peft_config)
    return Critic(backbone, trains_backbone=True)


class CriticTrainer:
    """
    Trains the critic. Gradients add up over the micro-batches of the student's accumulation window.

    Args:
        critic ([`Critic`]):
            The model to train.
        args ([`GADConfig`]):
            Its `critic_*` fields, `cliprange_value`, `gradient_checkpointing` and `per_device_train_batch_size` are used.
        accelerator ([`~accelerate.Accelerator`]):
            The student trainer's accelerator.
    """

    def __init__(self, critic: Critic, args: GADConfig, accelerator: Accelerator):
        if args.gradient_checkpointing and critic.trains_backbone:
            critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.args = args
        self.accelerator = accelerator
        self.engine = make_engine(
            critic,
            accelerator,
            learning_rate=args.critic_learning_rate,
            weight_decay=0.0,
            max_grad_norm=args.critic_max_grad_norm,
        )
        self.critic = self.engine.module

    @staticmethod
    def _inputs(batch: dict[str, torch.Tensor], rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, int]:
        return (
            torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1),
            torch.cat([batch["prompt_mask"][rows], batch["completion_mask"][rows]], dim=1),
            batch["completion_ids"].size(1),
        )

    @torch.no_grad()
    def values(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Values before each token of a generation batch.

        Args:
            batch (`dict[str, torch.Tensor]`):
                `prompt_ids`, `prompt_mask` of shape `(B, P)`; `completion_ids`, `completion_mask` of shape `(B, T)`.

        Returns:
            `torch.Tensor` of shape `(B, T)`.
        """
        size = self.args.per_device_train_batch_size
        starts = range(0, len(batch["prompt_ids"]), size)
        return torch.cat([self.critic(*self._inputs(batch, slice(start, start + size))) for start in starts])

    def backward(self, batch: dict[str, torch.Tensor], tokens_per_window: torch.Tensor) -> torch.Tensor:
        """
        Add the gradient of the value loss of one micro-batch.

        Args:
            batch (`dict[str, torch.Tensor]`):
                As in [`~CriticTrainer.values`], with `old_values` and `returns` of shape `(B, T)`.
            tokens_per_window (`torch.Tensor`):
                Response tokens in the accumulation window, per process: the loss is their mean.

        Returns:
            `torch.Tensor`: Sum of the loss over the micro-batch's tokens, detached.
        """
        with self.engine.chunk(is_last=self.accelerator.sync_gradients):
            values = self.engine.model(*self._inputs(batch))
            loss = clipped_value_loss(values, batch["old_values"], batch["returns"], self.args.cliprange_value)
            loss = (loss * batch["completion_mask"]).sum()
            self.engine.backward(loss / tokens_per_window)
        return loss.detach()

    def step(self) -> float:
        """Take an optimizer step at the end of an accumulation window. Returns the gradient norm before clipping."""
        return self.engine.step()

    def save(self, directory: Path) -> None:
        """Write the trained weights and the optimizer's state to `directory`. Every process takes part."""
        self.engine.save(directory, save_weights=lambda: self._save_weights(directory))

    def _save_weights(self, directory: Path) -> None:
        weights = self.engine.state_dict()
        if self.accelerator.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            trained = {name for name, parameter in self.critic.named_parameters() if parameter.requires_grad}
            save_file({name: value for name, value in weights.items() if name in trained}, directory / CRITIC_NAME)

    def load(self, directory: Path) -> None:
        """Restore what [`~CriticTrainer.save`] wrote."""
        weights = directory / CRITIC_NAME
        self.engine.load(directory, load_weights=lambda: copy_into(self.critic.state_dict(), load_file(weights)))
