"""
Benchmarks train what their pages say: the settings are read where they reach a trainer, and stand in the page in its words.

Nothing is trained here. A default that moves below a benchmark is seen, as is a page that no longer fits.
"""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parents[1]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
COMMAND = re.compile(r"python benchmarks/(\w+)\.py([^`\n]*)")
WORD_PROBLEMS = ["--proxy", "p", "--data", "d", "--pretraining_data", "s"]
REAL_TEXT = ["--student", "s", "--teacher", "t", "--data", "d"]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path[:] = path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).is_relative_to(BENCHMARKS) or Path(file).is_relative_to(ROOT / "recipes"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def tinyworld():
    return importlib.import_module("common.tinyworld")


@pytest.fixture(scope="module")
def rows(tinyworld):
    """Some rows of the teacher, and their tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinyworld.WORLD / "student", padding_side="left")
    return tinyworld.tokenized(tinyworld.teacher_rows("test").select(range(8)), tokenizer), tokenizer


class Made(Exception):
    """A trainer would be made."""

    def __init__(self, settings):
        self.settings = settings


def settings_of(monkeypatch, owner, name, run, *arguments):
    """The configuration that reaches a trainer, which is not made."""

    def trainer(*models, args, **others):
        raise Made(args)

    monkeypatch.setattr(owner, name, trainer)
    with pytest.raises(Made) as made:
        run(*arguments)
    return made.value.settings


def rows_a_step(settings):
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


def rate(value):
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def says(page, *phrases):
    text = " ".join((DOCS / page).read_text().split())
    for phrase in phrases:
        assert phrase in text, phrase


def commands(text):
    return [(name, shlex.split(options, comments=True)) for name, options in COMMAND.findall(text.replace("\\\n", ""))]


PAGES = [
    DOCS / name
    for name in (
        "results.md",
        "performance.md",
        "gad.md",
        "proxykd.md",
        "bayeskd.md",
        "llkd.md",
        "multi_gpu.md",
        "gpu/h100.md",
    )
]
TOLD = [(page.stem, *found) for page in [*PAGES, *DOCS.glob("results/*.md")] for found in commands(page.read_text())]


@pytest.mark.parametrize("page, name, options", TOLD, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_of_the_docs_are_understood(page, name, options):
    importlib.import_module(name).parse_args(options)


def test_commands_are_found():
    assert len(TOLD) >= 25 and {"real_text", "tinyworld_ablations", "kd_loss", "gpu"} <= {name for _, name, _ in TOLD}


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_the_scripts_are_understood(name):
    module = importlib.import_module(name)
    for script, options in commands(inspect.getdoc(module)):
        assert script == name
        if options:
            module.parse_args(options)


def test_scripts_are_small():
    lengths = sorted(len(path.read_text().splitlines()) for path in BENCHMARKS.rglob("*.py"))
    assert lengths[-1] <= 500 and lengths[len(lengths) // 2] <= 200


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("real_text").parse_args([*REAL_TEXT, "--sft_batch", "16", "--unknown", "1"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_real_text(monkeypatch, tmp_path, rows):
    import trl_bbkd.seqkd.trainer as seqkd

    benchmark, seeds = importlib.import_module("real_text"), importlib.import_module("common.seeds")
    args = benchmark.parse_args(REAL_TEXT)
    dataset, tokenizer = rows

    def arm(name):
        benchmark.train_arm(args, name, seeds.KeptRuns(tmp_path, 0), dataset.to_list(), dataset, tokenizer, None)

    start = settings_of(monkeypatch, seqkd, "SFTTrainer", arm, "warmed")
    sft = settings_of(monkeypatch, seqkd, "SFTTrainer", arm, "seqkd")
    gad = settings_of(monkeypatch, benchmark, "GADTrainer", arm, "gad")
    alone = gad.max_steps * gad.warmup_epochs / gad.num_train_epochs
    prompts = rows_a_step(gad) / gad.num_generations
    assert start.lr_scheduler_type == sft.lr_scheduler_type == "linear" and gad.max_steps == sft.max_steps
    assert gad.warmup_learning_rate == gad.discriminator_only_steps == 0
    says(
        "results/gad.md",
        f"{start.max_steps} SFT steps (batch {rows_a_step(start)}, {rate(start.learning_rate)} linear to 0)",
        f"From there, {sft.max_steps} optimizer steps",
        f"SFT at batch {rows_a_step(sft)} from the start's weights, {rate(sft.learning_rate)} linear to 0. "
        f"The best of {seqkd.CURVE_POINTS} checkpoints",
        f"{alone:g} of D alone, {gad.max_steps - alone:g} adversarial; {prompts:g} prompts x {gad.num_generations} samples "
        f"at temperature {gad.temperature:g}, {gad.discriminator_head} head",
        f"policy {rate(gad.learning_rate)}, D {rate(gad.discriminator_learning_rate)}, beta {gad.beta:g}, "
        f"{gad.scale_rewards} advantages",
        f"at most {gad.max_completion_length} student tokens",
        f"{args.validation_prompts} for validation, {args.test_prompts} for the tables",
        f"{args.test_prompts * args.samples} for each seed and temperature",
    )


@pytest.mark.slow
def test_gad_in_tinyworld(monkeypatch, tmp_path, tinyworld):
    ablations = importlib.import_module("tinyworld_ablations")
    selection = importlib.import_module("gad_prompt_selection")
    for name in ("MAX_COUNT", "MAX_AMOUNT"):
        monkeypatch.setattr(tinyworld.world, name, getattr(tinyworld.world, name))
    experiment = selection.SelectionExperiment(tmp_path, 0, 1, 1)
    plain = ablations.Experiment(tmp_path, 0, 1, 1)
    size = len(next(plain.sft_batches())[0])
    gad = settings_of(monkeypatch, ablations, "GADTrainer", plain.arm, "GAD (group)")
    first, second = (ablations.parse_args(o) for _, name, o in TOLD if name == "tinyworld_ablations")
    answers = len(plain.train)
    says(
        "results/gad.md",
        f"counting to {tinyworld.world.MAX_COUNT} by up to {tinyworld.world.MAX_AMOUNT} at once",
        f"SeqKD: {ablations.SEQKD_STEPS:,} steps of {size} prompts ({ablations.SEQKD_STEPS * size / answers:g} epochs), "
        f"{rate(ablations.SEQKD_LEARNING_RATE)} linear to 0, its best of {ablations.CURVE_POINTS} checkpoints",
        f"trains {gad.max_steps} steps of {rows_a_step(gad) / gad.num_generations:g} prompts x {gad.num_generations} "
        f"samples ({rate(gad.learning_rate)} linear to 0, beta {gad.beta:g}, {gad.scale_rewards} std, "
        f"{gad.discriminator_head} head)",
        f"SFT on the same {answers:,} answers for {first.discriminator_steps:,} steps",
        f"first {second.discriminator_base_steps:,} steps instead of {first.discriminator_base_steps} on text of the "
        f"world, then {second.discriminator_steps} steps of SFT instead of {first.discriminator_steps:,}",
    )
    assert gad.lr_scheduler_type == "linear" and gad.warmup_epochs == 0

    pooled = settings_of(monkeypatch, selection, "PoolGADTrainer", experiment.arm, "disagreement")
    kept = settings_of(monkeypatch, selection, "GADTrainer", experiment.arm, selection.PLAIN)
    assert rows_a_step(kept) == selection.KEPT * selection.GROUP == rows_a_step(gad)
    says(
        "results/gad.md",
        f"sample a pool of {rows_a_step(pooled) / pooled.num_generations:g} prompts, learn from the {selection.KEPT}",
    )


def test_score_board_in_tinyworld(monkeypatch, tmp_path, tinyworld):
    arms, worlds = importlib.import_module("common.arms"), importlib.import_module("common.worlds")
    ablations = importlib.import_module("tinyworld_ablations")
    for name in ("MAX_COUNT", "MAX_AMOUNT"):
        monkeypatch.setattr(tinyworld.world, name, getattr(tinyworld.world, name))
    world = worlds.Tinyworld(tmp_path)
    found = arms.arms_of(arms.TINYWORLD)
    gad = world.gad_config(tmp_path, 0, **found["GAD"][1][0])
    answers = gad.max_steps * rows_a_step(gad)
    assert gad.sft_weight == 0 and world.gad_config(tmp_path, 0, **found["GAD, anchored"][1][0]).sft_weight == 0.1
    preference = world.preference_config(tmp_path, 0, **found["PreferenceKD, judge: discriminator"][1][0])
    assert (preference.warmup_epochs, preference.sft_weight) == (0, 1) and preference.sample_temperature == 1
    # Two samples and the teacher's answer of a pair
    assert 0.9 < 3 * preference.num_train_epochs * len(world.train) / answers < 1.1
    assert 0.9 < preference.num_generations * len(world.train) / answers < 1.1
    assert arms.ON_POLICY["max_steps"] * arms.ON_POLICY["per_device_train_batch_size"] == answers
    offline = world.proxy_arguments(0)
    assert offline["max_steps"] * offline["per_device_train_batch_size"] == answers
    assert {len(grid) for _, grid in found.values()} == {3} and len(world.held_out["test"]) == 256
    assert {len(grid) for _, grid in arms.arms_of(arms.STORIES).values()} == {2}
    says(
        "results/scoreboard.md",
        f"{answers:,} in tinyworld",
        f"{ablations.SEQKD_STEPS:,} steps of SFT",
        f"{len(world.held_out['test'])} test prompts, {world.num_samples} samples each at temperatures 1.2, 1.0, 0.8, 0.6, 0.4 and 0.2",
    )
    assert world.temperatures == (1.2, 1.0, 0.8, 0.6, 0.4, 0.2)


def test_proxykd_in_tinyworld(monkeypatch, tmp_path):
    benchmark = importlib.import_module("proxykd_tinyworld")
    recipe, data = benchmark.parse_args([]).recipe, {"train": None, "test": None}
    found = {
        arm: settings_of(
            monkeypatch, benchmark, "ProxyKDTrainer", benchmark.train, recipe, tmp_path, 0, changes, data, None
        )
        for arm, (_, changes) in benchmark.ARMS.items()
    }
    first, answers = found["Proxy-KD"], 4000
    for settings in found.values():
        assert settings.lr_scheduler_type == "linear"
        says(
            "results/proxykd.md",
            f"every student takes {settings.max_steps} steps of {rows_a_step(settings)} rows, "
            f"{rate(settings.learning_rate)} linear to 0",
        )
    assert not found["SeqKD"].needs_proxy and found["SeqKD"].distil_on_all_rows and found["no proxy"].kl_weight == 0
    align = round(first.alignment_share * answers)
    says(
        "results/proxykd.md",
        f"{round(first.warmup_share * answers)} warm the proxy up, {align:,} align it in {first.alignment_rounds} rounds, "
        f"{answers - round(first.warmup_share * answers) - align:,} are the student's",
        f"`preference_weight` is {first.preference_weight:g} in the recipe",
        f"**`kl_weight`** {found['kl_weight 1'].kl_weight:g}, {first.kl_weight:g}, {found['kl_weight 100'].kl_weight:g}:",
    )


def word_problem_runs(benchmark, tmp_path, monkeypatch, *kinds):
    """The seed's runs, with its student made, and targets found."""
    (tmp_path / "seed_0/student").mkdir(parents=True)
    (tmp_path / "seed_0/student/model.safetensors").touch()
    args = benchmark.parse_args([*WORD_PROBLEMS, "--output_dir", str(tmp_path)])
    data = SimpleNamespace(train=None, held_out={"test": None}, scored={"validation": []})
    runs = benchmark.Runs(args, 0, data, None, *kinds)
    monkeypatch.setattr(runs, "targets", lambda name: tmp_path)
    return runs


def test_proxykd_on_real_text(monkeypatch, tmp_path):
    benchmark = importlib.import_module("proxykd_real_text")
    runs = word_problem_runs(benchmark, tmp_path, monkeypatch, "proxies", "arms")
    found = {arm: settings_of(monkeypatch, benchmark, "ProxyKDTrainer", runs.trained, arm) for arm in benchmark.ARMS}
    for settings in found.values():
        assert settings.lr_scheduler_type == "linear" and settings.stages == ["distil"]
        says(
            "results/proxykd.md",
            f"every student takes {settings.max_steps} steps of {rows_a_step(settings)} rows, "
            f"{rate(settings.learning_rate)} linear to 0. `kl_weight` is {found['proxykd'].kl_weight:g}",
        )
    says(
        "results/proxykd.md",
        f"of at most {runs.args.max_prompt_length} tokens of prompt and {runs.args.max_completion_length} of answer",
        f"476 align it in {found['proxykd'].alignment_rounds} rounds",
    )
    shares = found["proxykd"].warmup_share, found["proxykd"].alignment_share
    assert [round(share * 1059) for share in shares] in ([106, 477], [107, 476])
    weights = {name: found[name].kl_weight for name in ("seqkd", "no_proxy", "kl_1", "kl_100", "kl_1_bucket_all")}
    assert weights == {"seqkd": 0, "no_proxy": 0, "kl_1": 1, "kl_100": 100, "kl_1_bucket_all": 1}
    assert found["proxykd"].target_tail == "renormalize" and found["bucket"].target_tail == "bucket"


def test_students_of_word_problems_are_pretrained_alike(monkeypatch, tmp_path):
    shared = importlib.import_module("common.word_problems")
    args = shared.word_problems_parser("", "out", {}).parse_args(WORD_PROBLEMS)
    data = SimpleNamespace(pretraining=None)
    found = settings_of(monkeypatch, shared, "ProxyKDTrainer", shared.pretrain, None, args, 0, data, None, tmp_path)
    assert (found.max_steps, rows_a_step(found), found.learning_rate) == (300, 16, 6e-3)
    assert found.kl_weight == 0 and found.distil_on_all_rows and found.max_completion_length == 96


def test_bayeskd_on_real_text(monkeypatch, tmp_path):
    benchmark = importlib.import_module("bayeskd_real_text")
    runs = word_problem_runs(benchmark, tmp_path, monkeypatch, "proxies", "estimates", "arms")
    found = {arm: settings_of(monkeypatch, benchmark, "BayesKDTrainer", runs.trained, arm) for arm in benchmark.ARMS}
    for settings in found.values():
        assert settings.learning_rate == 3e-3 and settings.lr_scheduler_type == "linear"
        says("results/bayeskd.md", f"{settings.max_steps} steps of {rows_a_step(settings)} rows")
    says("results/bayeskd.md", papers(found["hard + prior + posterior"]))
    default = found["h+post, κ=1, K=50"]
    assert (default.posterior_concentration, default.posterior_draws, default.prior_weight) == (1, 50, 0)


def papers(settings):
    """The page's line on what it takes to be the paper's."""
    return (
        f"(K = {settings.posterior_draws}, κ = {settings.posterior_concentration:g}, γ = {settings.prior_gamma:g}, "
        f"n = {settings.ngram_context_length}, weights {settings.prior_weight:g} and {settings.posterior_weight:g})"
    )


def test_bayeskd_in_tinyworld(monkeypatch, tmp_path):
    benchmark = importlib.import_module("bayeskd_tinyworld")
    args = benchmark.parse_args(["--output_dir", str(tmp_path)])
    runs = benchmark.Seed(args, 0, {"train": None, "test": None}, {}, [], None)
    monkeypatch.setattr(benchmark.shutil, "copytree", lambda *folders: None)
    monkeypatch.setattr(runs, "warmed_up", lambda name: tmp_path)
    arms = [arm for arm, changes in benchmark.ARMS.items() if "known" not in changes]
    found = {arm: settings_of(monkeypatch, benchmark, "BayesKDTrainer", runs.arm, arm) for arm in arms}
    for settings in found.values():
        assert (rows_a_step(settings), settings.learning_rate, settings.lr_scheduler_type) == (64, 1.2e-2, "linear")
        says("results/bayeskd.md", f"The recipe's student and {settings.max_steps} steps")
    says(
        "results/bayeskd.md", papers(found["hard + prior + posterior"]), f"on {args.rows:,} of the 4,000 training rows"
    )
    assert found["hard (SFT)"].prior_weight == found["hard (SFT)"].posterior_weight == 0


@pytest.mark.parametrize("arm", ["all rows", "class_mean", "maxnorm", "student only"])
def test_llkd_on_real_text(monkeypatch, arm):
    benchmark = importlib.import_module("llkd_real_text")
    args = benchmark.parse_args([])
    runs = benchmark.Seed.__new__(benchmark.Seed)
    runs.args, runs.name, runs.seed, runs.results, runs.tokenizer = args, "trec", 0, {}, None
    runs.split = SimpleNamespace(labels=["a", "b"])
    monkeypatch.setattr(benchmark, "build_student", lambda *arguments: None)
    pool = range(benchmark.DATASETS["trec"]["pool"])
    found = settings_of(monkeypatch, benchmark, "LLKDTrainer", runs.student, "weak", arm, pool)
    drawn = rows_a_step(found) * (1 if arm == "all rows" else found.pool_factor)
    passes = found.max_steps * drawn / len(pool)
    says(
        "results/llkd.md",
        f"two layers of width {args.hidden_size} on MiniLM's word vectors, {passes:g} passes in pools of {drawn}",
        f"taught {benchmark.DATASETS['trec']['weak']} rows (weak) or {benchmark.DATASETS['trec']['strong']} (strong)",
        f"fitted on {benchmark.CHECKED} other rows",
    )
    assert found.learning_rate == 2e-3 and found.max_length == 40


def test_performance():
    loss, store, bayeskd, llkd, gad = (
        importlib.import_module(name).parse_args([])
        for name in ("kd_loss", "target_store", "bayeskd_step", "llkd_step", "gad_step")
    )
    says(
        "performance.md",
        f"{loss.tokens:,} tokens, vocabulary {loss.vocab:,}, hidden sizes {loss.hidden} and {loss.proxy_hidden:,}, {loss.dtype}",
        f"{store.rows:,} rows of {store.tokens * 3 // 4} to {store.tokens * 5 // 4} tokens",
        f"k = {store.k}, on the machine's disk. Nothing else ran beside. Medians of {store.repeats} repeats",
        f"A Llama of {bayeskd.layers} layers, hidden size {bayeskd.hidden_size}, on {bayeskd.batch} rows of "
        f"{bayeskd.tokens} answer tokens; targets of {bayeskd.top_k} tokens",
        f"A BERT of {llkd.layers} layers, width {llkd.hidden_size}, a pool of {llkd.pool} rows of {llkd.tokens} tokens",
        f"{gad.prompts} prompts x {gad.samples} samples of {gad.tokens} tokens",
    )


CLAIMS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (DOCS / "results.md").read_text().splitlines()
    if line.startswith("|") and ".md" in line
]


def section(link):
    """The text that a link of `results.md` leads to: a heading's, or a whole page."""
    path, _, anchor = link.partition("#")
    parts = re.split(r"^(#+) (.*)$", (DOCS / path).read_text(), flags=re.MULTILINE)
    if not anchor:
        return "".join(parts)
    headings = list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))
    slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title, _ in headings]
    first = slugs.index(anchor)
    level = len(headings[first][0])
    last = next((i for i in range(first + 1, len(headings)) if len(headings[i][0]) <= level), len(headings))
    return "\n".join(text for _, _, text in headings[first:last])


@pytest.mark.parametrize("claim, figures, seeds, page", CLAIMS, ids=lambda cell: cell[:40])
def test_claims_stand_in_their_pages(claim, figures, seeds, page):
    text = section(re.search(r"\((.*?)\)", page)[1])
    assert "python benchmarks/" in text or "accelerate launch recipes/" in text
    there = [float(number) for number in re.findall(r"\d+\.\d+", text)]
    for number in re.findall(r"\d+\.\d+", figures):
        digits = len(number.partition(".")[2])
        assert number in {f"{value:.{digits}f}" for value in there}, number


def test_there_are_claims():
    assert len(CLAIMS) >= 20
