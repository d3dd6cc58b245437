import torch
from transformers import AutoModelForCausalLM

from tests.conftest import build_model

from .helpers import make_kd_trainer


def test_a_padded_proxy_of_the_same_family(tmp_path, tiny_model_dir):
    """Its output layer has more rows than the student's: they stand for no token."""
    proxy = build_model(tmp_path / "proxy", hidden_size=48)
    model = AutoModelForCausalLM.from_pretrained(proxy)
    model.resize_token_embeddings(model.config.vocab_size + 30)
    with torch.no_grad():
        model.get_output_embeddings().weight[-30:] = 1.0
    model.save_pretrained(proxy)
    for source in ("cache", "live"):
        config = {"stages": ["cache", "distil"], "target_source": source, "target_top_k": 40, "max_steps": 2}
        trainer = make_kd_trainer(tmp_path / source, tiny_model_dir, proxy, **config)
        trainer.train()
        if source == "cache":
            store = trainer.data_collator.stores[0]
            assert all(store[key].ids.max() < 330 for key in store.keys)
        assert trainer.state.log_history[0]["kl"] < 8
