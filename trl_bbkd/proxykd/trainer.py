import importlib.util
import logging
import math

import numpy as np
from datasets import Dataset

from ..errors import TeacherDataError
from ..proxy.trainer import SAME_WHEN_RESUMED, ProxyTargetTrainer
from .config import ProxyKDConfig
from .on_policy import OnPolicyMixin
from .stage_rows import StageRows, split_rows
from .stages import ProxyKDStages
from .weights import RowWeights, row_weights


logger = logging.getLogger(__name__)

LENGTH_PENALTY = -0.9  # correlation of weight and length


class ProxyKDTrainer(OnPolicyMixin, ProxyTargetTrainer):
    r"""
    Trainer for Proxy-KD ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013), version 2).

    An open proxy is aligned to a teacher of which only the text is known, and the student learns from the teacher's
    text and from the proxy's distributions over it. One call to `train` goes through the stages: warm-up of the proxy,
    its alignment (see [`ProxyAlignmentTrainer`]), its soft targets, and distillation. Each has its own rows and is
    kept on disk below `output_dir/proxy`: a second run goes on at the first stage that is not finished.

    With `target_source="on_policy"` the proxy's distributions are those over the student's own samples, drawn at every
    step.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bbkd import ProxyKDConfig, ProxyKDTrainer

    trainer = ProxyKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        proxy_model="Qwen/Qwen2.5-7B-Instruct",
        args=ProxyKDConfig(output_dir="student"),
        train_dataset=load_dataset("json", data_files="teacher.jsonl", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, as in [`~trl.SFTTrainer`].
        proxy_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The proxy, with the student's tokenizer; instead of `args.proxy_model`.
        args ([`ProxyKDConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational: `completion` is the teacher's
            answer to `prompt`. It is divided between the stages.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, for the student's evaluation and the proxy's agreement with the
            teacher.
        processing_class, callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.SFTTrainer`], for the student.

    Raises:
        TeacherDataError: If the teacher text breaks the contract or a stage has no rows, before any model is loaded.
        VocabularyError: If proxy and student do not share a tokenizer, before any model is loaded.
        ProxyModelError: If the proxy is missing, is the student, or is an adapter without its base model.
        ValueError: If the run is to be sharded in a way that cannot work (see [`~host.sharding.check_sharding`]), or with a
            proxy that is no path.
    """

    _tag_names = ["trl", "trl-bbkd", "proxykd"]
    _name = "Proxy-KD"
    _card_settings = (
        "proxy_model",
        "proxy_learning_rate",
        "alignment_rounds",
        "target_source",
        "kl_direction",
        "kl_weight",
        "sample_weighting",
        "target_top_k",
    )
    _card_note = "Part of what it learned is its proxy's: an open model's imitation of the teacher."
    _paper = {
        "title": "Knowledge Distillation of Black-Box Large Language Models",
        "id": "2401.07013",
        # docstyle-ignore
        "citation": """@article{proxykd2024,
    title        = {{Knowledge Distillation of Black-Box Large Language Models}},
    year         = 2024,
    eprint       = {arXiv:2401.07013},
}""",
    }
    _same_when_resumed = (
        *SAME_WHEN_RESUMED,
        "kl_weight",
        "kl_direction",
        "target_source",
        "sample_weighting",
        "on_policy_temperature",
        "on_policy_top_p",
        "max_completion_length",
    )
    _config_type = ProxyKDConfig
    _stages_type = ProxyKDStages
    _without_proxy = "kl_weight=0.0 is plain SFT, which needs none."
    _why_no_stream = "divides the teacher's rows between its stages and weighs each against all others"

    args: ProxyKDConfig
    proxy_stages: ProxyKDStages

    row_weights: RowWeights | None = None

    def _has_targets(self, args: ProxyKDConfig) -> bool:
        return super()._has_targets(args) and args.target_source == "cache"

    def _check_setup(self, args: ProxyKDConfig, eval_dataset: Dataset | None) -> None:
        if self._needs_proxy:
            check_alignment(args, eval_dataset)

    def _divide(self, rows: Dataset, args: ProxyKDConfig) -> tuple[StageRows, Dataset]:
        stage_rows = split_rows(rows, args.warmup_share, args.alignment_share, args.seed)
        check_stage_rows(stage_rows, args)
        return stage_rows, rows if args.distil_on_all_rows else stage_rows.distil

    @property
    def warnings(self) -> list[dict]:
        """What looks wrong, with its remedy: `step` (0, because the stages come before the student's steps) and `text`."""
        texts = []
        for report in self.proxy_stages.reports:
            measured = [entry for entry in report["metrics"] if "top1_agreement_se" in entry]
            if report["stage"] != ProxyKDStages.labels["align"] or not measured:
                continue
            first, last = (measured[position]["top1_agreement"] for position in (0, -1))
            # Both are of the same tokens: of their difference this is the most that it can be
            error = math.hypot(*(measured[position]["top1_agreement_se"] for position in (0, -1)))
            if first - last > 2 * error:
                texts.append(
                    f"The alignment lowered the proxy's agreement with the teacher, from {first:.3f} to {last:.3f} of held-out "
                    f"positions (standard error of the difference {error:.3f}). Lower alignment_learning_rate or alignment_epochs, "
                    "or set alignment_patience, which keeps the best round."
                )
        if self.row_weights is not None and self.row_weights.length_correlation < LENGTH_PENALTY:
            texts.append(
                f"The row weights of equation 9 are a length penalty: their correlation with the answers' lengths is "
                f"{self.row_weights.length_correlation:.2f}. Set sample_weighting='mean'."
            )
        return [{"step": 0, "text": text} for text in texts]

    def _prepare_targets(self) -> None:
        stages, args = self.proxy_stages, self.args
        if not args.needs_proxy:
            return
        stages.train_proxy()
        is_live = args.target_source != "cache"
        wants_store = "cache" in args.stages and (not is_live or args.sample_weighting != "none")
        if wants_store or args.target_store is not None:
            store = stages.store(self._whole_rows)
            self._weigh_rows(store)
            self.data_collator.stores = [] if is_live else [store]
        if is_live and "distil" in args.stages:
            self.live_proxy = stages.loaded_proxy()
        self.target_weights, self.reverse_kl = [args.kl_weight], args.kl_direction == "reverse"

    def _weigh_rows(self, store) -> None:
        """Equation 9, over all rows of the student."""
        keys, log_likelihoods, tokens = store.log_likelihoods()
        position = np.searchsorted(keys, np.array(self.train_dataset["row_key"]))
        found = row_weights(log_likelihoods[position], tokens[position], self.args.sample_weighting)
        self.row_weights = found
        if self.accelerator.is_main_process and self.args.sample_weighting != "none":
            logger.warning(
                f"Weights of {len(position):,} rows (equation 9): mean log-likelihood {found.mean:.3f}, standard deviation "
                f"{found.std:.3f}; correlation of weight and length {found.length_correlation:.2f}."
            )
        if "sample_weight" in self.train_dataset.column_names:
            self.train_dataset = self.train_dataset.remove_columns("sample_weight")
        self.train_dataset = self.train_dataset.add_column("sample_weight", found.weights.tolist())


def check_alignment(args: ProxyKDConfig, eval_dataset: Dataset | None) -> None:
    """
    Raises:
        ValueError: the alignment could not do what is asked of it, when its turn comes.
    """
    if "align" not in args.stages:
        return
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        raise ValueError("use_vllm=True needs vLLM: pip install 'trl-bbkd[vllm]'.")
    if args.alignment_patience is not None and eval_dataset is None:
        raise ValueError("alignment_patience needs eval_dataset: agreement is measured on held-out rows.")


def check_stage_rows(rows: StageRows, args: ProxyKDConfig) -> None:
    """
    Raises:
        [`~errors.TeacherDataError`]: a stage that is to run has no rows, or fewer than rounds.
    """
    wanted = {"warmup": ("warmup", "warmup_share"), "align": ("align", "alignment_share"), "distil": ("distil", None)}
    for stage, (name, share) in wanted.items():
        is_run = stage in args.stages and (args.needs_proxy or stage == "distil")
        if not is_run or len(getattr(rows, name)):
            continue
        advice = (
            f"Raise {share}, or take '{stage}' out of stages." if share else "Lower warmup_share or alignment_share."
        )
        raise TeacherDataError(f"The stage '{stage}' has no rows (of {sum(map(len, rows))}). {advice}")
    if "align" in args.stages and args.needs_proxy and args.preference_weight > 0:
        if len(rows.align) < args.alignment_rounds:
            raise TeacherDataError(
                f"Round {len(rows.align) + 1} of {args.alignment_rounds} has an empty shard: alignment has {len(rows.align)} "
                "rows. Lower alignment_rounds, or raise alignment_share."
            )
    unused = {
        stage: len(getattr(rows, name))
        for stage, (name, _) in wanted.items()
        if stage not in args.stages and stage != "distil" and len(getattr(rows, name))
    }
    if unused and not args.distil_on_all_rows:
        left = " and ".join(f"{count:,} rows of '{stage}'" for stage, count in unused.items())
        logger.warning(f"{left} stay unused: distil_on_all_rows=True, or shares of 0, give them to the student.")
