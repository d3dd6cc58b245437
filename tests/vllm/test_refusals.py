"""What is refused before any model is loaded."""

import pytest

from tests.gad.helpers import make_config, no_model_is_loaded
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.gad.vllm import check_vllm


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 does not divide the 1 processes"),
        (
            {"top_p": 0.9},
            "top_p=0.9 biases the importance-sampling correction.*vllm_importance_sampling_correction=False",
        ),
        ({"top_k": 50}, "top_k=50 biases"),
        ({"min_p": 0.1}, "min_p=0.1 biases"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 biases"),
    ],
)
def test_what_vllm_cannot_do(config, message, tmp_path, monkeypatch):
    no_model_is_loaded(monkeypatch)
    monkeypatch.setattr("trl_bbkd.gad.vllm.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=message) as error:
        GADTrainer("student", args=make_config(tmp_path, use_vllm=True, vllm_mode="colocate", **config))
    assert "\n" not in str(error.value)


def test_without_vllm(tmp_path, monkeypatch):
    no_model_is_loaded(monkeypatch)
    with pytest.raises(ValueError, match=r'use_vllm=True needs vllm.*pip install "trl-bbkd\[vllm\]"'):
        GADTrainer("student", args=make_config(tmp_path, use_vllm=True))


def test_what_is_fine_without_a_correction(tmp_path, monkeypatch):
    """Then nothing is computed of vLLM's log-probabilities."""
    monkeypatch.setattr("trl_bbkd.gad.vllm.find_spec", lambda name: name)
    check_vllm(make_config(tmp_path, use_vllm=True, top_p=0.9, vllm_importance_sampling_correction=False))
    check_vllm(make_config(tmp_path, top_p=0.9))
