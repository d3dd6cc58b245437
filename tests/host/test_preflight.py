"""Files of weights that were not copied to their end."""

import shutil
from pathlib import Path

import pytest

from tests.gad.helpers import make_trainer
from tests.proxykd.helpers import make_kd_trainer
from trl_bbkd.errors import WeightsError
from trl_bbkd.host.preflight import refuse_broken_weights


@pytest.fixture
def cut(tmp_path):
    """A copy of a model with a part of its weights."""

    def copy(model, keep=0.6):
        shutil.copytree(model, tmp_path / "cut")
        file = tmp_path / "cut/model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])
        return str(tmp_path / "cut")

    return copy


@pytest.mark.parametrize("keep", [0.6, 0.001, 0])
def test_the_file_is_named(cut, tiny_model_dir, keep):
    path = cut(tiny_model_dir, keep)
    with pytest.raises(WeightsError, match=f"^The student's weights cannot be read: {path}/model.safetensors"):
        refuse_broken_weights(path, "student")


def test_whole_ones_models_in_memory_and_on_the_hub_pass(tiny_model_dir):
    for model in (tiny_model_dir, Path(tiny_model_dir), None, object(), "someone/model"):
        refuse_broken_weights(model, "student")


@pytest.fixture
def never_loads(monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))


def test_gads_models(cut, tmp_path, tiny_model_dir, standard_rows, never_loads):
    path = cut(tiny_model_dir)
    with pytest.raises(WeightsError, match="^The student's weights"):
        make_trainer(tmp_path / "out", path, standard_rows)
    with pytest.raises(WeightsError, match="^The discriminator's weights"):
        make_trainer(tmp_path / "out", tiny_model_dir, standard_rows, discriminator=path)


def test_proxykds_models(cut, tmp_path, tiny_model_dir, other_model_dir, never_loads):
    path = cut(other_model_dir)
    with pytest.raises(WeightsError, match="^The student's weights"):
        make_kd_trainer(tmp_path / "out", path, tiny_model_dir)
    with pytest.raises(WeightsError, match="^The proxy's weights"):
        make_kd_trainer(tmp_path / "out", tiny_model_dir, path)
