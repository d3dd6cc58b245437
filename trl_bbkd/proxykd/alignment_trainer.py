from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..host.model_files import adapter_of
from ..host.preflight import refuse_prompt_learning, require_config, require_model
from ..preference.trainer import SAME_WHEN_RESUMED, PreferenceRoundsTrainer
from ..proxy.agreement import teacher_agreement
from ..proxy.checks import NO_VIRTUAL_TOKENS
from ..soft_targets.head import check_head, check_partitioned_head
from .alignment_config import ProxyAlignmentConfig


class ProxyAlignmentTrainer(PreferenceRoundsTrainer):
    r"""
    Trainer that aligns an open proxy to a teacher of which only the text is known: the alignment stage of Proxy-KD
    ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013), equations 3 to 6).

    The rows are cut into `num_rounds` shards. In each round the proxy answers the prompts of its shard, and DPO
    prefers the teacher's answers over these samples, together with the NLL of the teacher's answers. The reference of
    a round is the proxy as it was when the round began.

    `train` goes through all rounds. In `output_dir` it leaves the aligned proxy, `alignment.json` with what was
    measured before and after every round, and a folder a round with its samples. A run that was stopped goes on by
    itself, from the last checkpoint of its round, with the samples it had.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The proxy, as in [`~trl.DPOTrainer`].
        args ([`ProxyAlignmentConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format: `completion` is the teacher's answer to `prompt`.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, on which agreement with the teacher is measured.
        processing_class, callbacks, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`].

    Raises:
        TypeError: If `model` is no model, `args` another trainer's configuration, or `processing_class` no tokenizer.
        TeacherDataError: If the teacher text breaks the contract, or there are fewer rows than rounds.
        ValueError: If the run is to be sharded in a way that cannot work (see [`~host.sharding.check_sharding`]), or with a
            proxy in memory; if `alignment_patience` has nothing to measure on; if `output_dir` holds another run.
    """

    _tag_names = ["trl", "trl-bbkd", "proxykd"]
    _name = "Proxy alignment"
    _role = "proxy"
    _training_name = "alignment"
    _same_when_resumed = (*SAME_WHEN_RESUMED, "alignment_patience")
    _best_by = "top1_agreement"

    args: ProxyAlignmentConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ProxyAlignmentConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        require_model(model, type(self).__name__)
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = ProxyAlignmentConfig(f"{path.split('/')[-1]}-aligned")
        require_config(args, ProxyAlignmentConfig, type(self).__name__)
        if eval_dataset is None and args.alignment_patience is not None:
            raise ValueError("alignment_patience needs eval_dataset: agreement is measured on held-out rows.")
        refuse_prompt_learning(adapter_of(model) or peft_config, "proxy", NO_VIRTUAL_TOKENS)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        (check_partitioned_head if self._is_sharded else check_head)(self.model)

    @property
    def _patience(self) -> int | None:
        return self.args.alignment_patience

    def _measured(self, rows: list[dict]) -> dict[str, float]:
        batch_size, pad_id = self.args.per_device_eval_batch_size, self._tokenizer.pad_token_id
        with self._whole() as model:
            return teacher_agreement(model, rows, self.accelerator, batch_size, pad_id)
