from datasets import Dataset, concatenate_datasets

from ..data.teacher_data import end_token_id, row_names
from ..errors import TeacherDataError
from ..proxy.trainer import SAME_WHEN_RESUMED, ProxyTargetTrainer
from .config import BayesKDConfig
from .stages import BayesKDRows, BayesKDStages
from .top_logprobs import TOP_LOGPROBS, check_top_logprobs, count_inexact, without_inexact


ROWS_AT_ONCE = 10_000


class BayesKDTrainer(ProxyTargetTrainer):
    r"""
    Trainer for Bayes-KD ([arXiv 2401.07013](https://arxiv.org/abs/2401.07013v1), version 1), in our reading of
    it: no public text has the paper's equations.

    The closed teacher's distribution over the next token is estimated, and the student learns from the teacher's text
    and from the estimate: a prior from n-gram counts of the teacher's answers, and a posterior that draws of an open
    proxy refine it to. One call to `train` warms the proxy up on the teacher's text, estimates, and distils. Each
    stage is kept on disk below `output_dir/proxy`: a second run goes on at the first one that is not finished.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bbkd import BayesKDConfig, BayesKDTrainer

    trainer = BayesKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        proxy_model="Qwen/Qwen2.5-7B-Instruct",
        args=BayesKDConfig(output_dir="student"),
        train_dataset=load_dataset("json", data_files="teacher.jsonl", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, as in [`~trl.SFTTrainer`].
        proxy_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The proxy, with the student's tokenizer; instead of `args.proxy_model`.
        args ([`BayesKDConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational: `completion` is the teacher's
            answer to `prompt`. A column `top_logprobs` may hold log-probabilities that the teacher's API showed, in
            the student's tokens: `{"ids": [[...], ...], "logprobs": [[...], ...]}`, a list of both per answer token.
            Where they are, the posterior is they. A value with `exact: False` counts with `args.inexact_top_logprobs` alone.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, for the student's evaluation and the estimate's calibration.
        processing_class, callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.SFTTrainer`], for the student.

    Raises:
        TeacherDataError: If the teacher text or `top_logprobs` breaks the contract, before any model is loaded.
        VocabularyError: If proxy and student do not share a tokenizer, before any model is loaded.
        ProxyModelError: If the proxy is missing, is the student, or is an adapter without its base model.
        ValueError: If the run is to be sharded in a way that cannot work (see [`~host.sharding.check_sharding`]), or with a
            proxy that is no path.
    """

    _tag_names = ["trl", "trl-bbkd", "bayeskd"]
    _name = "Bayes-KD"
    _card_settings = (
        "proxy_model",
        "proxy_learning_rate",
        "ngram_context_length",
        "posterior_draws",
        "posterior_weight",
        "prior_weight",
    )
    _card_note = (
        "Part of what it learned is an estimate of the teacher's distributions, from counts of its text and an open model's "
        "imitation of it."
    )
    _paper = {
        "title": "Knowledge Distillation for Closed-Source Language Models",
        "id": "2401.07013",
        # docstyle-ignore
        "citation": """@article{bayeskd2024,
    title        = {{Knowledge Distillation for Closed-Source Language Models}},
    year         = 2024,
    eprint       = {arXiv:2401.07013v1},
}""",
    }
    _same_when_resumed = (*SAME_WHEN_RESUMED, "prior_weight", "posterior_weight")
    _config_type = BayesKDConfig
    _stages_type = BayesKDStages
    _without_proxy = "posterior_weight=0.0 leaves the hard loss and the prior, which need none."
    _why_no_stream = "counts all of the teacher's answers before it trains on one"

    _not_exact = 0  # values of `top_logprobs` that are not taken

    args: BayesKDConfig
    proxy_stages: BayesKDStages

    def _divide(self, rows: Dataset, args: BayesKDConfig) -> tuple[BayesKDRows, Dataset]:
        feature = rows.features.get(TOP_LOGPROBS)
        if not args.inexact_top_logprobs and isinstance(feature, dict) and "exact" in feature:
            shown = rows.select_columns(TOP_LOGPROBS)
            self._not_exact = sum(count_inexact(batch) for batch in shown.with_format("arrow").iter(ROWS_AT_ONCE))
            if self._not_exact:
                shown = shown.map(
                    lambda batch: {TOP_LOGPROBS: without_inexact(batch[TOP_LOGPROBS])},
                    batched=True,
                    features=shown.features,
                    desc="Leaving out what is not exact",
                )
                rows = concatenate_datasets([rows.remove_columns(TOP_LOGPROBS), shown], axis=1)
        return BayesKDRows(warmup=rows, estimate=rows), rows

    def _check_rows(self, rows: Dataset, tokenizer, vocab_size: int) -> None:
        if not any(rows["teacher_ids"]):
            raise TeacherDataError("The teacher's answers have no tokens: there is nothing to count.")
        if TOP_LOGPROBS in rows.column_names:
            end_id = end_token_id(tokenizer, rows[0]["prompt"])
            check_top_logprobs(rows[TOP_LOGPROBS], rows["teacher_ids"], vocab_size, end_id, row_names(rows))

    def _prepare_targets(self) -> None:
        if not self.args.needs_targets:
            return
        if self.args.needs_proxy:
            self.proxy_stages.train_proxy()
        if "estimate" in self.args.stages or self.args.target_store is not None:
            self.data_collator.stores = self.proxy_stages.stores(self._whole_rows)
            self.target_weights = list(self.args.target_weights.values())

    def _kl_names(self, count: int) -> list[str]:
        return [f"kl_{name}" for name in self.args.target_weights]

    @property
    def calibration(self) -> dict | None:
        """
        How well prior, proxy and posterior predict held-out teacher text: see [`~calibration.calibration`]. `None`
        before `train`, without `eval_dataset` and without a proxy.
        """
        return self.proxy_stages.calibration

    @property
    def warnings(self) -> list[dict]:
        """What looks wrong, with its remedy: `step` (0, because the estimate comes before the student) and `text`."""
        texts, found = [], self.calibration
        if TOP_LOGPROBS in self.proxy_stages.rows.estimate.column_names and self.args.posterior_weight == 0:
            texts.append(f"`{TOP_LOGPROBS}` was not used: it is part of the posterior, and posterior_weight is 0.")
        if self._not_exact:
            texts.append(
                f"{self._not_exact} values of `{TOP_LOGPROBS}` are not exact and were not used: there the teacher's tokens are not "
                "all the student's. With inexact_top_logprobs=True they are."
            )
        error = None if found is None else found.get("gain_se")
        if error is not None and found["posterior"] - found["proxy"] > 2 * error:
            texts.append(
                f"The posterior predicts held-out teacher text worse than the proxy alone: {found['posterior']:.3f} against "
                f"{found['proxy']:.3f} nats per token (standard error of the difference {error:.3f}), because of the n-gram prior. "
                "Try a lower posterior_concentration or more posterior_draws, and compare the students."
            )
        return [{"step": 0, "text": text} for text in texts]
