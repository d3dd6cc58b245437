"""What methods with a proxy share, as recipes, runs and reports see it."""

from dataclasses import replace

from ..errors import RecipeError, StageError, TargetStoreError
from ..runs.held_models import HeldModel, Phase, longest_row, rows_of_a_step, student_of
from ..runs.method import Method
from ..runs.methods import load_class


class ProxyMethod(Method):
    """
    A method whose soft targets come from a proxy.

    Attributes:
        trainer_type (`str`):
            Its [`~proxy.trainer.ProxyTargetTrainer`], as `"package.module:Class"`.
        store_stage (`str`):
            The stage that writes the targets to disk.
    """

    trainer_type: str
    store_stage = "cache"
    report = "trl_bbkd.proxy.report:ProxyReport"
    console_keys: tuple[str, ...] = (
        "loss",
        "nll",
        "kl",
        "kl_prior",
        "kl_posterior",
        "mean_token_accuracy",
        "learning_rate",
    )
    input_paths = ("proxy_model", "target_store")
    init_options = ("proxy",)
    goes_on_by_itself = True
    # What is on disk from an earlier run is looked at when its stage comes
    errors: tuple[type[Exception], ...] = (StageError, TargetStoreError)

    def check(self, recipe) -> None:
        if recipe.script_args.dataset_streaming or recipe.dataset_args.streaming:
            trainer = load_class(self.trainer_type)
            raise RecipeError(f"dataset_streaming must be false: {trainer._name} {trainer._why_no_stream}.")

    def phases(self, recipe) -> list[Phase]:
        """The proxy's stages, one after the other, and the student's."""
        args, student = recipe.training_args, student_of(recipe)
        found = []
        if args.needs_proxy and args.target_store is None:
            proxy, waiting = self.proxy(recipe), replace(student, trains=False, waits=True, learns=0.0)
            if self.trains_proxy(args):
                found.append(self.training_of_the_proxy(recipe, proxy, waiting))
            if self.store_stage in args.stages:
                models = (self.frozen(proxy, args), waiting)
                rows = args.per_device_eval_batch_size
                found.append(Phase("the proxy's targets", models, longest_row(args), rows, loss="dense"))
        if "distil" in args.stages:
            found.append(self.training_of_the_student(recipe, student))
        return found

    def trains_proxy(self, args) -> bool:
        return "warmup" in args.stages

    def proxy(self, recipe) -> HeldModel:
        """The proxy, as it is trained."""
        args = recipe.training_args
        kwargs = args.proxy_model_init_kwargs or {}
        quantization = kwargs.get("quantization_config")
        quantization = quantization if isinstance(quantization, dict) else {}
        return HeldModel(
            name="proxy",
            source=args.proxy_model,
            key="proxy_model",
            adapter=args.proxy_lora_kwargs,
            dtype=str(kwargs.get("dtype", "float32")),
            is_4bit=bool(quantization.get("load_in_4bit")),
            storage_of_4bit=quantization.get("bnb_4bit_quant_storage", "uint8"),
            rows=args.proxy_per_device_train_batch_size or args.per_device_train_batch_size,
            learns=1.0,
            as_adapter="""--proxy_lora_kwargs '{"target_modules": "all-linear"}' """
            """--proxy_model_init_kwargs '{"dtype": "bfloat16"}'""",
        )

    def frozen(self, proxy: HeldModel, args) -> HeldModel:
        """The trained proxy while it makes targets: whole on each device, in bfloat16 where the run computes in it."""
        given = (args.proxy_model_init_kwargs or {}).get("dtype")
        dtype = given or ("bfloat16" if args.bf16 else "float32")
        rows = args.per_device_eval_batch_size
        return replace(proxy, trains=False, is_whole=True, dtype=dtype, rows=rows, reads=1.0, learns=0.0)

    def training_of_the_proxy(self, recipe, proxy: HeldModel, waiting: HeldModel) -> Phase:
        """The largest of the phases in which the proxy learns, while the student waits."""
        args = recipe.training_args
        accumulation = args.proxy_gradient_accumulation_steps or args.gradient_accumulation_steps
        return Phase("the proxy's training", (proxy, waiting), longest_row(args), proxy.rows * accumulation)

    def training_of_the_student(self, recipe, student: HeldModel) -> Phase:
        args = recipe.training_args
        return Phase(
            "the student's training",
            (student,),
            longest_row(args),
            rows_of_a_step(args),
            loss="sparse" if args.needs_targets else "tokens",
            targets_per_token=args.target_top_k if args.needs_targets else 0,
        )

    def trainer(self, job):
        from datasets import Dataset

        return load_class(self.trainer_type)(eval_dataset=Dataset.from_list(job.test), **job.trainer_arguments())

    def more_results(self, job, trainer) -> dict[str, dict[str, float]]:
        """The proxy that the student learned from, under the same judge."""
        from .report import PROXY

        if not trainer.has_own_proxy:
            return {}
        proxy = trainer.live_proxy or trainer.proxy_stages.loaded_proxy()
        return {PROXY: job.measure(proxy, temperatures=job.temperatures[:1])}

    def findings(self, trainer) -> dict:
        return {"stages": trainer.stage_reports}

    def warnings(self, trainer) -> list[dict]:
        return trainer.warnings
