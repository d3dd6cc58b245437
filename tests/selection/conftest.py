import pytest

from tests.bayeskd.helpers import make_trainer

from .helpers import make_bayes_trainer, make_sft_trainer, selection_rows


@pytest.fixture(scope="session")
def targets(tmp_path_factory, tiny_model_dir, other_model_dir):
    """Bayes-KD's targets of 48 rows."""
    folder = tmp_path_factory.mktemp("targets")
    make_trainer(folder, tiny_model_dir, other_model_dir, selection_rows(48), 0, stages=["estimate"]).train()
    return folder / "proxy/targets"


@pytest.fixture(params=["sft", "bayeskd"])
def make(request, tiny_model_dir, targets):
    """Makes a trainer in a folder: SFT as a user mixes the selection in, or Bayes-KD with soft targets."""

    def made(output_dir, rows=None, **kwargs):
        if request.param == "sft":
            return make_sft_trainer(output_dir, tiny_model_dir, rows, **kwargs)
        return make_bayes_trainer(output_dir, tiny_model_dir, targets, rows, **kwargs)

    made.kind = request.param
    return made
