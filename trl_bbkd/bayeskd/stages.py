"""The stages before the student's: warm-up of the proxy, and the estimate of the teacher's distributions."""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets

from ..errors import TargetStoreError
from ..host.files import write_atomically
from ..proxy.stage_folder import finish_stage, finished_stage
from ..proxy.stages import ProxyStages, release_memory, store_metrics
from ..soft_targets.caching import StoreSpec, fill_stores, rows_fingerprint
from ..soft_targets.store import TargetStore, check_description, read_description
from .calibration import DRAWS, HeldOutTokens, calibration, hits
from .config import BayesKDConfig
from .ngram import NGramModel, answer_contexts, build_ngram_model
from .targets import ProxyDistributions, TargetEstimator
from .top_logprobs import TOP_LOGPROBS


logger = logging.getLogger(__name__)

GIB = 2**30
ANSWERS_PER_CHUNK = 10_000
CALIBRATION_FILE = "calibration.json"


class BayesKDRows(NamedTuple):
    """Rows of the proxy's warm-up, and of the estimate and distillation: the same."""

    warmup: Dataset
    estimate: Dataset


class BayesKDStages(ProxyStages):
    """The stages of Bayes-KD: see [`~proxy.stages.ProxyStages`] for arguments and how they are run."""

    labels = ProxyStages.labels | {"estimate": "estimate of the teacher"}

    args: BayesKDConfig
    rows: BayesKDRows

    # [`~calibration.calibration`] of the estimate, once it is made; not without held-out rows or without a proxy
    calibration: dict | None = None

    def stores(self, rows: Dataset) -> list[TargetStore]:
        """
        Estimate the teacher's distribution at the student's rows, or take the estimate that was handed in.

        Args:
            rows ([`~datasets.Dataset`]):
                Rows with `input_ids`, `labels` and `row_key`, in the order of `self.rows.estimate`.

        Returns:
            `list[TargetStore]`: one for each of `args.target_weights`.

        Raises:
            [`~errors.TargetStoreError`]: the stores are another proxy's, of other rows or another k.
        """
        k, names = self.args.target_top_k, list(self.args.target_weights)
        if self.args.target_store is not None:
            folder = Path(self.args.target_store)
            self._check_use_of_top_logprobs(folder)
            return [
                self._handed_in_store(folder / name, rows, k, "estimate", self._settings_of(name)) for name in names
            ]
        corpus = _digest(sorted(rows["row_key"]))
        if "posterior" in names and TOP_LOGPROBS in self.rows.estimate.column_names:
            rows = self._with_top_logprobs(rows)
        folder = self.folder / "targets"
        specs = [StoreSpec(folder / name, k, self._fingerprint(name, rows, corpus)) for name in names]
        reports = [finished_stage(spec.folder, spec.fingerprint | {"k": k}) for spec in specs]
        # Once for both, and not at all where everything is on disk
        distributions = functools.cache(self._distributions)
        if None in reports:
            report = self._estimated(rows, specs, corpus, distributions)
            if self.accelerator.is_main_process:
                for spec in specs:
                    finish_stage(spec.folder, spec.fingerprint | {"k": k}, report)
            self.accelerator.wait_for_everyone()
            # As they are read back by a run that goes on
            reports = [finished_stage(spec.folder, spec.fingerprint | {"k": k}) for spec in specs]
        for spec in specs:
            check_description(spec.folder, k, spec.fingerprint)
        # The posterior's, if there is one
        self.reports.append(reports[-1])
        if self.held_out is not None and self.args.needs_proxy:
            self.calibration = self._calibrated(specs[-1].fingerprint, corpus, distributions)
        del distributions
        release_memory()
        return [TargetStore(spec.folder) for spec in specs]

    def _distributions(self) -> ProxyDistributions:
        return ProxyDistributions(self.loaded_proxy(), self.args, self.vocab_size, self._pad_id)

    def _estimated(
        self, rows: Dataset, specs: list[StoreSpec], corpus: str, distributions: Callable[[], ProxyDistributions]
    ) -> dict:
        started = time.perf_counter()
        ngrams = self._ngrams(corpus)
        estimator = TargetEstimator(ngrams, distributions() if self.args.needs_proxy else None, self.args)
        batch_size = self.args.per_device_eval_batch_size
        stores = fill_stores(specs, rows, estimator, batch_size=batch_size, description="Estimate of the teacher")
        seen_once = ngrams.singleton_share
        if self.accelerator.is_main_process:
            logger.warning(
                f"{seen_once:.1%} of the answer tokens have a context of {ngrams.context_length} tokens that was seen once: "
                "there, without back-off, the prior is the token itself."
            )
        metrics = store_metrics(*stores) | {"contexts_seen_once": seen_once}
        report = {"stage": self.labels["estimate"], "rows": len(stores[0]), "metrics": [metrics]}
        return report | {"seconds": time.perf_counter() - started}

    def _ngrams(self, corpus: str) -> NGramModel:
        answers = self.rows.estimate.select_columns("teacher_ids").with_format("arrow")

        def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in answers.iter(batch_size=ANSWERS_PER_CHUNK):
                column = batch["teacher_ids"].combine_chunks()
                yield column.flatten().to_numpy(), column.value_lengths().to_numpy()

        with self.accelerator.main_process_first():
            return build_ngram_model(
                self.folder / "ngrams",
                chunks,
                num_tokens=sum(int(lengths.sum()) for _, lengths in chunks()),
                vocab_size=self.vocab_size,
                context_length=self.args.ngram_context_length,
                memory_limit=int(self.args.ngram_memory_limit * GIB),
                fingerprint={"corpus": corpus},
            )

    def _calibrated(
        self, posterior: dict[str, str], corpus: str, distributions: Callable[[], ProxyDistributions]
    ) -> dict:
        """The calibration on disk, if it is of this posterior and these held-out rows; else a new one."""
        rows = self._held_out_rows()
        fingerprint = posterior | {"held_out": rows_fingerprint([row["row_key"] for row in rows])}
        path = self.folder / CALIBRATION_FILE
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["fingerprint"] == fingerprint:
                return found["calibration"]
        found = {
            "fingerprint": fingerprint,
            "calibration": self._calibration(rows, self._ngrams(corpus), distributions()),
        }
        text = json.dumps(found, indent=2)
        if self.accelerator.is_main_process:
            write_atomically(path, text + "\n")
        self.accelerator.wait_for_everyone()
        # As it is read back by a run that goes on
        return json.loads(text)["calibration"]

    def _calibration(self, rows: list[dict], ngrams: NGramModel, distributions: ProxyDistributions) -> dict:
        args, state = self.args, self.accelerator
        rows = rows[state.process_index :: state.num_processes]
        counts = tuple(sorted({*DRAWS, args.posterior_draws}))
        found = []
        for start in range(0, len(rows), args.per_device_eval_batch_size):
            batch = rows[start : start + args.per_device_eval_batch_size]
            answers = [[token for token in row["labels"][1:] if token != -100] for row in batch]
            tokens = np.concatenate([np.asarray(answer, dtype=np.int64) for answer in answers])
            lengths = np.array([len(answer) for answer in answers])
            contexts = answer_contexts(tokens, lengths, ngrams.context_length, ngrams.vocab_size)
            with torch.no_grad():
                draws, probs = zip(*distributions.draws_and_probs(batch, max(counts)), strict=True)
            times_drawn = hits(torch.cat(draws).numpy(), tokens, counts)
            ngram = torch.from_numpy(ngrams.probability(contexts, tokens, args.ngram_min_count))
            found.append((ngram, torch.cat(probs), times_drawn))
        ngrams_of, probs_of, times_drawn_of = zip(*gather_object(found), strict=True)
        held_out = HeldOutTokens(
            torch.cat(ngrams_of),
            torch.cat(probs_of),
            {count: torch.cat([drawn[count] for drawn in times_drawn_of]) for count in counts},
        )
        return calibration(held_out, args.posterior_draws, args.posterior_concentration, self.vocab_size)

    # What targets depend on

    def _check_use_of_top_logprobs(self, folder: Path) -> None:
        if TOP_LOGPROBS not in self.rows.estimate.column_names or "posterior" not in self.args.target_weights:
            return
        if TOP_LOGPROBS not in read_description(folder / "posterior")["fingerprint"]:
            raise TargetStoreError(
                f"The rows have `{TOP_LOGPROBS}`, but the posterior in {folder} was made without. Leave target_store out and "
                "put 'estimate' into stages, or take the column out."
            )

    def _with_top_logprobs(self, rows: Dataset) -> Dataset:
        """The rows with what an API showed of them. Of rows of the same tokens the last one counts: one that has it."""
        shown = self.rows.estimate.select_columns(TOP_LOGPROBS)
        rows = concatenate_datasets([rows, shown], axis=1)
        parts = [
            batch[TOP_LOGPROBS].is_null().to_numpy()
            for batch in shown.with_format("arrow").iter(batch_size=ANSWERS_PER_CHUNK)
        ]
        is_null = np.concatenate(parts)
        return rows.select(np.argsort(~is_null, kind="stable")) if is_null.any() else rows

    def _fingerprint(self, name: str, rows: Dataset, corpus: str) -> dict[str, str]:
        fingerprint = self._targets_fingerprint(rows) | {"corpus": corpus} | self._settings_of(name)
        uses_proxy = name == "posterior" and self.args.needs_proxy
        if not uses_proxy:
            del fingerprint["dtype"]
        else:
            fingerprint["proxy"] = self._proxy_fingerprint()
            fingerprint["proxy_model_init_kwargs"] = str(self.args.proxy_model_init_kwargs)
        if uses_proxy and self.args.posterior_sampling == "drawn":
            fingerprint["seed"] = str(self.args.seed)
        if TOP_LOGPROBS in rows.column_names and name == "posterior":
            fingerprint[TOP_LOGPROBS] = _rows_digest(rows.select_columns(["row_key", TOP_LOGPROBS]))
        return fingerprint

    def _settings_of(self, name: str) -> dict[str, str]:
        args = self.args
        names = ["ngram_context_length", "ngram_min_count", "prior_gamma"]
        if name == "posterior":
            names += ["posterior_draws", "posterior_concentration", "posterior_grid_points"]
            names += ["posterior_sampling", "proxy_temperature", "proxy_top_k"] if args.needs_proxy else []
        return {"target": name} | {name: str(getattr(args, name)) for name in names}


def _digest(values: list) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def _rows_digest(rows: Dataset) -> str:
    """A hash of some rows, whatever their order."""
    digests = [_digest(list(row.values())) for batch in rows.iter(ANSWERS_PER_CHUNK) for row in _as_rows(batch)]
    return _digest(sorted(digests))


def _as_rows(batch: dict[str, list]) -> Iterator[dict]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
