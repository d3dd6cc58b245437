"""
What the score-board's students learn by, and the settings that are tried of each: as many of every method, three in
tinyworld and two of the stories.

A training takes a world, the start's folder, its own, a seed and settings, and leaves the student in its folder.
"""

from collections.abc import Callable
from pathlib import Path

from .arguments import evidence_arguments


TINYWORLD, STORIES = WORLDS = ("tinyworld", "stories")
SFT_RATES = {TINYWORLD: (3e-4, 1e-3, 2e-3), STORIES: (3e-4, 1e-3)}
SDFT_RATES = {TINYWORLD: (1e-4, 3e-4, 1e-3), STORIES: (1e-4, 3e-4)}
GAD_RATES = {TINYWORLD: (1e-3, 2e-3, 4e-3), STORIES: (7.5e-5, 1.5e-4)}
ANCHORS = {TINYWORLD: (0.1, 0.3, 1.0), STORIES: (0.3, 1.0)}
ENTROPIES = {TINYWORLD: (0.1, 0.3, 1.0), STORIES: (0.1, 0.3)}
# As many samples as GAD has, each of them once
ON_POLICY = {
    "target_source": "on_policy",
    "kl_direction": "reverse",
    "per_device_train_batch_size": 256,
    "max_steps": 120,
}
ORACLE = "the judge itself"
TEACHER_EPOCHS = {TINYWORLD: 0.5, STORIES: 0.75}
DPO_RATES = {TINYWORLD: (2e-4, 7e-4, 2e-3), STORIES: (1e-4, 3e-4)}


def train_gad(world, start: Path, folder: Path, seed: int, settings: dict) -> None:
    from trl_bbkd import GADTrainer

    trainer = GADTrainer(
        model=str(start),
        args=world.gad_config(folder, seed, **settings),
        train_dataset=world.train,
        processing_class=world.tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def train_sft(world, start: Path, folder: Path, seed: int, settings: dict) -> None:
    """With as many answers a step as GAD has samples; its own order of rows."""
    from trl_bbkd.seqkd.trainer import train_seqkd

    args = world.gad_config(folder, 1000 + seed)
    train_seqkd(
        str(start),
        args,
        world.train,
        world.tokenizer,
        measure=lambda model: {},
        is_better=lambda new, best: True,
        output_dir=str(folder),
        max_steps=args.max_steps,
        learning_rate=settings["learning_rate"],
    )


def train_preference(world, start: Path, folder: Path, seed: int, settings: dict) -> None:
    from trl_bbkd import PreferenceKDTrainer

    judges = {"judge": world.quality_beside_answer} if settings.get("judge") == ORACLE else {}
    given = {name: value for name, value in settings.items() if value != ORACLE}
    trainer = PreferenceKDTrainer(
        model=str(start),
        args=world.preference_config(folder, seed, **given),
        train_dataset=world.train,
        processing_class=world.tokenizer,
        **judges,
    )
    trainer.train()
    trainer.save_model(str(folder))


def train_proxykd(world, start: Path, folder: Path, seed: int, settings: dict) -> None:
    from trl_bbkd import ProxyKDConfig, ProxyKDTrainer

    trainer = ProxyKDTrainer(
        model=str(start),
        args=ProxyKDConfig(
            str(folder),
            stages=["cache", "distil"],
            distil_on_all_rows=True,
            **world.proxy_arguments(seed) | settings,
        ),
        train_dataset=world.train,
        processing_class=world.tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def train_sdft(world, start: Path, folder: Path, seed: int, settings: dict) -> None:
    from common import sdft

    gad = world.gad_config(folder, seed)
    sdft.train_sdft(
        start,
        folder,
        world.train,
        world.tokenizer,
        max_steps=gad.max_steps,
        per_device_train_batch_size=gad.per_device_train_batch_size,
        num_generations=gad.num_generations,
        max_completion_length=world.max_new_tokens,
        lr_scheduler_type=gad.lr_scheduler_type,
        **evidence_arguments(seed),
        **settings,
    )


def train_bayeskd(world, start: Path, folder: Path, seed: int, settings: dict) -> None:
    from trl_bbkd import BayesKDConfig, BayesKDTrainer

    trainer = BayesKDTrainer(
        model=str(start),
        args=BayesKDConfig(str(folder), stages=["estimate", "distil"], **world.proxy_arguments(seed), **settings),
        train_dataset=world.train,
        processing_class=world.tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def arms_of(world: str) -> dict[str, tuple[Callable, list[dict]]]:
    """Of each arm its training and the settings that are tried."""
    gad, dpo = GAD_RATES[world], DPO_RATES[world]
    arms = {
        "SeqKD, as many answers more": (train_sft, rates(SFT_RATES[world])),
        "GAD": (train_gad, rates(gad)),
        "GAD, token credit": (train_gad, rates(gad, discriminator_credit="token")),
        "GAD, anchored": (train_gad, [{"learning_rate": gad[1], "sft_weight": weight} for weight in ANCHORS[world]]),
        "GAD, less own likelihood": (
            train_gad,
            [{"learning_rate": gad[1], "discriminator_entropy": share} for share in ENTROPIES[world]],
        ),
        "PreferenceKD, judge: discriminator": (train_preference, rates(dpo, judge="discriminator")),
        "PreferenceKD, judge: overlap": (train_preference, rates(dpo, judge="overlap")),
        # A pair of each sample, so fewer epochs
        "PreferenceKD, judge: teacher": (
            train_preference,
            rates(dpo, judge="teacher", num_train_epochs=TEACHER_EPOCHS[world]),
        ),
        "PreferenceKD, by the judge itself": (train_preference, rates(dpo, judge=ORACLE)),
    }
    arms["SDFT"] = (train_sdft, rates(SDFT_RATES[world]))
    if world == TINYWORLD:
        # The stories have no larger open model with the student's tokenizer
        arms |= {
            "Proxy-KD": (train_proxykd, [{"kl_weight": weight} for weight in (1.0, 10.0, 100.0)]),
            "Proxy-KD, on policy": (
                train_proxykd,
                [{"kl_weight": weight, **ON_POLICY} for weight in (1.0, 10.0, 100.0)],
            ),
            "Bayes-KD": (train_bayeskd, [{"posterior_weight": weight} for weight in (0.3, 1.0, 3.0)]),
        }
    return arms


def rates(found: tuple[float, ...], **settings) -> list[dict]:
    return [{"learning_rate": rate, **settings} for rate in found]
