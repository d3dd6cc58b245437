"""What methods with a proxy share, as recipes, runs and reports see it."""

from ..errors import RecipeError, StageError, TargetStoreError
from ..runs.method import Method
from ..runs.methods import load_class


class ProxyMethod(Method):
    """
    A method whose soft targets come from a proxy.

    Attributes:
        trainer_type (`str`):
            Its [`~proxy.trainer.ProxyTargetTrainer`], as `"package.module:Class"`.
    """

    trainer_type: str
    report = "trl_bbkd.proxy.report:ProxyReport"
    console_keys = ("loss", "nll", "kl", "kl_prior", "kl_posterior", "mean_token_accuracy", "learning_rate")
    input_paths = ("proxy_model", "target_store")
    init_options = ("proxy",)
    goes_on_by_itself = True
    # What is on disk from an earlier run is looked at when its stage comes
    errors: tuple[type[Exception], ...] = (StageError, TargetStoreError)

    def check(self, recipe) -> None:
        if recipe.script_args.dataset_streaming or recipe.dataset_args.streaming:
            trainer = load_class(self.trainer_type)
            raise RecipeError(f"dataset_streaming must be false: {trainer._name} {trainer._why_no_stream}.")

    def trainer(self, job):
        from datasets import Dataset

        return load_class(self.trainer_type)(eval_dataset=Dataset.from_list(job.test), **job.trainer_arguments())

    def more_results(self, job, trainer) -> dict[str, dict[str, float]]:
        """The proxy that the student learned from, under the same judge."""
        from .report import PROXY

        if not trainer.has_own_proxy:
            return {}
        proxy = trainer.live_proxy or trainer.proxy_stages.loaded_proxy()
        return {PROXY: job.measure(proxy, temperatures=(1.0,))}

    def findings(self, trainer) -> dict:
        return {"stages": trainer.stage_reports}

    def warnings(self, trainer) -> list[dict]:
        return trainer.warnings
