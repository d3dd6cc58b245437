"""The stages before the student's: warm-up of the proxy, and the estimate of the teacher's distributions."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..proxy.stage import finish_stage, finished_stage
from ..proxy.stages import ProxyStages, release_memory, store_metrics
from ..soft_targets.caching import StoreSpec, fill_stores
from ..soft_targets.rows import soft_target_rows
from ..soft_targets.store import TargetStore, check_description
from .bayeskd_config import BayesKDConfig
from .calibration import DRAWS, HeldOutTokens, calibration, hits
from .ngram import NGramModel, answer_contexts, build_ngram_model
from .targets import ProxyDistributions, TargetEstimator
from .top_logprobs import TOP_LOGPROBS, shared_by_equal_rows


GIB = 2**30
ANSWERS_PER_CHUNK = 10_000


class BayesKDRows(NamedTuple):
    """Rows of the proxy's warm-up, and of the estimate and distillation: the same."""

    warmup: Dataset
    estimate: Dataset


class BayesKDStages(ProxyStages):
    """The stages of Bayes-KD: see [`~proxy.stages.ProxyStages`] for arguments and how they are run."""

    labels = ProxyStages.labels | {"estimate": "estimate of the teacher"}

    args: BayesKDConfig
    rows: BayesKDRows

    def stores(self, rows: Dataset) -> list[TargetStore]:
        """
        Estimate the teacher's distribution at the student's rows, or take the estimate that was handed in.

        Args:
            rows ([`~datasets.Dataset`]):
                Rows with `input_ids`, `labels` and `row_key`, in the order of `self.rows.estimate`.

        Returns:
            `list[TargetStore]`: one for each of `args.target_weights`.

        Raises:
            [`~soft_targets.store.TargetStoreError`]: the stores are another proxy's, of other rows or another k.
        """
        k, names = self.args.target_top_k, list(self.args.target_weights)
        if self.args.target_store is not None:
            folder = Path(self.args.target_store)
            return [self._handed_in_store(folder / name, rows, k, "estimate") for name in names]
        if TOP_LOGPROBS in self.rows.estimate.column_names:
            shown = shared_by_equal_rows(self.rows.estimate[TOP_LOGPROBS][:], rows["row_key"])
            rows = rows.add_column(TOP_LOGPROBS, shown)
        folder = self.folder / "targets"
        specs = [StoreSpec(folder / name, k, self._fingerprint(name, rows)) for name in names]
        fingerprint = {"targets": names, "k": k} | {
            key: value for spec in specs for key, value in spec.fingerprint.items()
        }
        report = finished_stage(folder, fingerprint)
        if report is None:
            report = self._estimated(rows, specs)
            if self.accelerator.is_main_process:
                finish_stage(folder, fingerprint, report)
            self.accelerator.wait_for_everyone()
            # As it is read back by a run that goes on
            report = finished_stage(folder, fingerprint)
        for spec in specs:
            check_description(spec.folder, k, spec.fingerprint)
        self.reports.append(report)
        return [TargetStore(spec.folder) for spec in specs]

    @property
    def calibration(self) -> dict | None:
        """[`~calibration.calibration`] of the estimate; `None` without held-out rows or without a proxy."""
        return next((report["calibration"] for report in self.reports if "calibration" in report), None)

    def _estimated(self, rows: Dataset, specs: list[StoreSpec]) -> dict:
        started = time.perf_counter()
        ngrams = self._ngrams()
        distributions = None
        if self.args.needs_proxy:
            distributions = ProxyDistributions(self.loaded_proxy(), self.args, self.vocab_size, self._pad_id)
        estimator = TargetEstimator(ngrams, distributions, self.args)
        batch_size = self.args.per_device_eval_batch_size
        stores = fill_stores(specs, rows, estimator, batch_size=batch_size, description="Estimate of the teacher")
        metrics = store_metrics(*stores) | {"contexts_seen_once": ngrams.tables[0].singleton_share}
        report = {"stage": self.labels["estimate"], "rows": len(stores[0]), "metrics": [metrics]}
        if self.held_out is not None and distributions is not None:
            report["calibration"] = self._calibration(ngrams, distributions)
        del distributions, estimator
        release_memory()
        return report | {"seconds": time.perf_counter() - started}

    def _ngrams(self) -> NGramModel:
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
                fingerprint={"corpus": self._corpus_fingerprint()},
            )

    def _calibration(self, ngrams: NGramModel, distributions: ProxyDistributions) -> dict:
        args, state = self.args, self.accelerator
        rows = self._held_out_rows()[state.process_index :: state.num_processes]
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
        found = gather_object(found)
        ngram, probs, times_drawn = zip(*found, strict=True)
        held_out = HeldOutTokens(
            torch.cat(ngram),
            torch.cat(probs),
            {count: torch.cat([drawn[count] for drawn in times_drawn]) for count in counts},
        )
        return calibration(held_out, args.posterior_draws, args.posterior_concentration, self.vocab_size)

    # What targets depend on

    def _corpus_fingerprint(self) -> str:
        """Of all answers that were counted: a row that is there twice counts twice."""
        keys = soft_target_rows(self.rows.estimate, self.tokenizer, self.args.chat_template_kwargs)["row_key"]
        return _digest(sorted(keys))

    def _fingerprint(self, name: str, rows: Dataset) -> dict[str, str]:
        args = self.args
        settings = ["ngram_context_length", "ngram_min_count", "prior_gamma"]
        fingerprint = self._targets_fingerprint(rows) | {"corpus": self._corpus_fingerprint()}
        if name == "posterior":
            settings += ["posterior_draws", "posterior_concentration", "posterior_sampling", "posterior_grid_points"]
            settings += ["proxy_temperature", "proxy_top_k", "seed"]
            if self.args.needs_proxy:
                fingerprint = {"proxy": self._proxy_fingerprint(), **fingerprint}
            if TOP_LOGPROBS in rows.column_names:
                fingerprint[TOP_LOGPROBS] = _digest(rows[TOP_LOGPROBS][:])
        return fingerprint | {name: str(getattr(args, name)) for name in settings}


def _digest(values: list) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
