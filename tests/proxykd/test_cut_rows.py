import pytest
import torch

from .helpers import make_kd_trainer


@pytest.mark.parametrize(("mode", "max_length"), [("keep_start", 24), ("keep_end", 10)])
def test_cut_rows_get_the_targets_that_whole_rows_have(tmp_path, tiny_model_dir, other_model_dir, mode, max_length):
    """The store holds rows as they are before `max_length` cuts them."""
    arguments = (tmp_path, tiny_model_dir, other_model_dir)
    whole = make_kd_trainer(*arguments, stages=["cache"])
    whole.train()
    stored = {path.name: path.read_bytes() for path in (tmp_path / "proxy/targets").glob("part-*")}
    trainer = make_kd_trainer(*arguments, max_length=max_length, truncation_mode=mode, stages=["cache", "distil"])
    trainer.train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "proxy/targets").glob("part-*")} == stored
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == max_length
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    assert len(batch["target_ids_0"]) == (batch["labels"][:, 1:] != -100).sum()

    store, offset, cut = trainer.data_collator.stores[0], 0, 0
    for row in trainer.train_dataset:
        targets, count = store[row["row_key"]], sum(label != -100 for label in row["labels"][1:])
        kept = slice(count) if mode == "keep_start" else slice(len(targets.ids) - count, None)
        found = slice(offset, offset := offset + count)
        assert torch.equal(batch["target_ids_0"][found], torch.from_numpy(targets.ids[kept]))
        assert torch.equal(batch["target_log_probs_0"][found], torch.from_numpy(targets.log_probs[kept]))
        cut += count < len(targets.ids)
    assert cut
