"""What the Bayes-KD benchmarks take the paper's setting to be; stated, so that it stays when `BayesKDConfig`'s defaults do not."""

PAPER = {
    "hard_weight": 1.0,
    "prior_weight": 1.0,
    "posterior_weight": 1.0,
    "prior_gamma": 3.0,
    "ngram_context_length": 3,
    "ngram_min_count": 1,
    "posterior_draws": 10,
    "posterior_concentration": 10.0,
    "posterior_sampling": "drawn",
    "target_tail": "renormalize",
}
