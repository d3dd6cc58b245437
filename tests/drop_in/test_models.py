"""What stands in the place of a model."""

from pathlib import Path

import pytest
from datasets import Dataset

from trl_bbkd import BayesKDTrainer, GADTrainer, LLKDTrainer, ProxyAlignmentTrainer, ProxyKDTrainer
from trl_bbkd.bayeskd.config import BayesKDConfig
from trl_bbkd.proxykd.config import ProxyKDConfig


TRAINERS = [GADTrainer, ProxyKDTrainer, BayesKDTrainer, ProxyAlignmentTrainer, LLKDTrainer]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("model", [123, None, Path("student")])
def test_what_is_no_model_is_refused(trainer, model):
    with pytest.raises(TypeError) as error:
        trainer(model=model)
    assert str(error.value) == (
        f"model of {trainer.__name__} must be a path or an id of the Hub (`str`), a `PreTrainedModel` or a `PeftModel`, got "
        f"{type(model).__name__}."
    )


def test_a_second_model_too(tmp_path, standard_rows):
    with pytest.raises(TypeError, match="^discriminator of GADTrainer must be a path .* got int.$"):
        GADTrainer("student", discriminator=123)
    for trainer, config in ((ProxyKDTrainer, ProxyKDConfig), (BayesKDTrainer, BayesKDConfig)):
        args, rows = config(str(tmp_path), use_cpu=True, bf16=False), Dataset.from_list(standard_rows)
        with pytest.raises(TypeError, match=f"^proxy_model of {trainer.__name__} must be a path .* got int.$"):
            trainer("student", 123, args, train_dataset=rows)
