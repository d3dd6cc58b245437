import numpy as np
from datasets import Dataset

from tests.gad.helpers import assert_same_weights, weights  # noqa: F401
from tests.proxykd.helpers import LORA, ON_CPU, make_rows  # noqa: F401
from trl_bbkd.bayeskd.config import BayesKDConfig
from trl_bbkd.bayeskd.trainer import BayesKDTrainer


# Both targets, and a prior that counts as much as the draws
BOTH = {
    "prior_weight": 1.0,
    "posterior_draws": 10,
    "posterior_concentration": 10.0,
    "posterior_sampling": "drawn",
}
SETTINGS = BOTH | {
    "learning_rate": 1e-3,
    "proxy_learning_rate": 1e-3,
    "per_device_eval_batch_size": 4,
    "ngram_context_length": 2,
}


def make_trainer(output_dir, student, proxy, rows=None, held_out=8, trainer_kwargs=None, **config):
    """Bayes-KD on 16 rows, hence 4 steps, with 8 held-out ones."""
    rows = make_rows(24) if rows is None else rows
    return BayesKDTrainer(
        student,
        proxy,
        BayesKDConfig(str(output_dir), **{**ON_CPU, **SETTINGS, **config}),
        train_dataset=Dataset.from_list(rows[held_out:]),
        eval_dataset=Dataset.from_list(rows[:held_out]) if held_out else None,
        **(trainer_kwargs or {}),
    )


def stored_targets(store):
    """Of each row of a store, of each of its tokens: probabilities by token id."""
    found = {}
    for key in store.keys.tolist():
        targets = store[key]
        found[key] = [
            {int(id_): float(p) for id_, p in zip(ids, probs, strict=True) if p > 0}
            for ids, probs in zip(targets.ids, np.exp(targets.log_probs.astype(np.float64)), strict=True)
        ]
    return found


def are_alike(first, second):
    """Whether [`stored_targets`] are the same but for rounding."""
    assert first.keys() == second.keys()
    pairs = [pair for key in first for pair in zip(first[key], second[key], strict=True)]
    return all(
        abs(one.get(token, 0.0) - other.get(token, 0.0)) < 1e-3 for one, other in pairs for token in {**one, **other}
    )
