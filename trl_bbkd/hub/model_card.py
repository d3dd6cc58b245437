"""The card of a student: whose text it learned from, how much of it, how good it is, how to use and repeat it."""

import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from ..host.version import __version__
from ..reports.markdown import code, escape, fenced, table
from ..reports.redaction import public_text
from ..reports.report import Report, counts_table, results
from .compared import CARD_NAME, with_comparison_of
from .eval_results import eval_results
from .names import hub_id


RECIPE_NAME = "recipe.yaml"
FIRST_HYPERPARAMETERS = 10
PLACEHOLDER = "Put an input here that is like those of the teacher's rows."
LIBRARIES = ("trl", "transformers", "accelerate", "peft", "datasets", "torch")


@dataclass
class StudentCard:
    """
    What is known about a student. What is not known is not in its card.

    Args:
        method (`str`):
            Name of the method, such as `"GAD"`.
        paper (`dict[str, str]`):
            `title`, `id` (arXiv) and `citation` (BibTeX) of the method.
        tags (`list[str]`):
            Tags on the Hub.
        base_model (`str`, *optional*):
            Checkpoint the student started from.
        name (`str`):
            Name of the student.
        repo_id (`str`):
            Its repository on the Hub, or where it lies.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether its weights are an adapter of `base_model`.
        note (`str`, *optional*):
            What a reader has to know of the method's students.
        example (`str` or `list[dict]`, *optional*):
            An input of the teacher's rows that strangers may read: see [`~hub.example.example_input`].
        conversational (`bool`, *optional*, defaults to `False`):
            Whether its prompts are messages.
        chat_template_kwargs (`dict`, *optional*):
            With which its prompts were rendered.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer it learned.
        labels (`list[str]`, *optional*):
            Names of its classes, if it is a classifier.
        folders (`list[str]`, *optional*):
            Folders that are pushed with it.
        teacher (`str`, *optional*):
            Name of the black-box teacher.
        datasets (`list[str]`, *optional*):
            Where the teacher's text came from: paths or Hub ids.
        counts (`dict`, *optional*):
            Data counts per split.
        hyperparameters (`dict`, *optional*):
            Name and value, what matters first.
        changed_settings, recipe_settings (`dict`, *optional*):
            Name and value of what else was not at its default when it ran: of the trainer's configuration, and of a
            recipe's other keys.
        hardware (`str`, *optional*):
            What it was trained on.
        settings (`dict`, *optional*):
            What the recipe says, without secrets.
        command (`str`, *optional*):
            How to repeat the run.
        report ([`~reports.report.Report`], *optional*):
            The finished run.
    """

    method: str
    paper: dict[str, str]
    tags: list[str]
    base_model: str | None
    name: str
    repo_id: str
    is_adapter: bool = False
    note: str | None = None
    example: str | list[dict] | None = None
    conversational: bool = False
    chat_template_kwargs: dict = field(default_factory=dict)
    max_new_tokens: int = 256
    labels: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    teacher: str | None = None
    datasets: list[str] = field(default_factory=list)
    counts: dict = field(default_factory=dict)
    hyperparameters: dict = field(default_factory=dict)
    changed_settings: dict = field(default_factory=dict)
    recipe_settings: dict = field(default_factory=dict)
    hardware: str | None = None
    settings: dict = field(default_factory=dict)
    command: str | None = None
    report: Report | None = None

    @property
    def teacher_name(self) -> str:
        """The teacher's name, or what to call one without, in Markdown."""
        return escape(self.teacher) if self.teacher else "an unnamed teacher"


def student_name(args, base_model: str | None, method: str) -> str:
    """
    What a student is called: as its repository where one is named, else after the model it started from and its method.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Its training's configuration.
        base_model (`str`, *optional*):
            Checkpoint the student started from.
        method (`str`):
            Name of the method.
    """
    if args.hub_model_id is None and base_model:
        return f"{Path(base_model).name}-{method.replace('-', '')}"
    return Path(args.hub_model_id or args.output_dir).name


def write_card(card: StudentCard, output_dir: str | Path) -> None:
    """Write `README.md`, and `recipe.yaml` where the run had a recipe, to `output_dir`."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = with_comparison_of(folder, render_card(card))
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if card.settings:
        (folder / RECIPE_NAME).write_text(recipe_text(card.settings), encoding="utf-8")


def recipe_text(settings: dict) -> str:
    """A recipe's keys and values, fit for strangers; its comments and `env` block stay at home."""
    return public_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def library_versions() -> dict[str, str]:
    """Versions a run depends on."""
    return {"trl-bbkd": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in LIBRARIES
    }


def render_card(card: StudentCard) -> str:
    """The text of the card, with its metadata, without secrets and absolute paths."""
    base_model = hub_id(card.base_model)
    task = "text-classification" if card.labels else "text-generation"
    metadata = ModelCardData(
        base_model=base_model,
        datasets=[name for name in map(hub_id, card.datasets) if name] or None,
        eval_results=(card.report and eval_results(card.report, card.datasets, task, card.repo_id)) or None,
        library_name="peft" if card.is_adapter else "transformers",
        model_name=card.name,
        pipeline_tag=task,
        tags=list(dict.fromkeys(card.tags)),
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {escape(card.name)}",
        _what_it_is(card),
        _teacher_text(card),
        _results(card),
        _usage(card),
        _making(card),
        _citation(card),
        _limits(card),
    ]
    return public_text("\n\n".join(section for section in sections if section) + "\n")


def _what_it_is(card: StudentCard) -> str:
    student = f"from {_linked(card.base_model)} " if card.base_model else ""
    return (
        f"A student distilled {student}with {_method(card)}: it learned from the answers of **{card.teacher_name}**, a "
        "teacher that could only be queried."
    )


def _method(card: StudentCard) -> str:
    return f"[{escape(card.method)}](https://huggingface.co/papers/{card.paper['id']})"


def _linked(name: str, kind: str = "") -> str:
    return f"[{code(name)}](https://huggingface.co/{kind}{name})" if hub_id(name) else code(name)


def _teacher_text(card: StudentCard) -> str:
    if not (card.teacher or card.datasets or card.counts):
        return ""
    lines = ["## Whose text, and how much", ""]
    names = [_linked(name, "datasets/") for name in card.datasets]
    source = f" in {', '.join(names)}" if names else ""
    lines += [f"The answers of **{card.teacher_name}**{source}."]
    if card.counts:
        lines += ["", *counts_table(card.counts)]
    return "\n".join(lines)


def _results(card: StudentCard) -> str:
    report = card.report
    if report is None:
        return ""
    lines = ["## How good it is", "", report.summary, "", *results(report)]
    lines += ["", "![Curves of the run](curves.png)"]
    for section in report.sections():
        lines += ["", f"### {section.title}", "", *section.lines]
    if report.warnings:
        first = report.warnings[0]["step"]
        lines += [
            "",
            f"Warnings during training: {len(report.warnings)}, the first at step {first}, in [`report.md`](report.md).",
        ]
    return "\n".join(lines)


def _usage(card: StudentCard) -> str:
    model_class = f"AutoModelFor{'SequenceClassification' if card.labels else 'CausalLM'}"
    head = f", num_labels={len(card.labels)}" if card.labels else ""
    lines = [
        f"from transformers import {model_class}, AutoTokenizer",
        "",
        f"student = {json.dumps(card.repo_id)}",
        "tokenizer = AutoTokenizer.from_pretrained(student)",
    ]
    note = ""
    if card.is_adapter and not hub_id(card.base_model):
        base = json.dumps(Path(card.base_model).name if card.base_model else "base")
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"base = {model_class}.from_pretrained({base}{head})")
        lines.append("model = PeftModel.from_pretrained(base, student)")
        note = "The weights are an adapter, and the model it belongs to is not on the Hub: put its path in place of `base`'s.\n\n"
    else:
        lines.append(f"model = {model_class}.from_pretrained(student{head if card.is_adapter else ''})")
    lines += _encoding(card)
    if card.labels:
        lines.append(f"print({_literal(card.labels)}[model(**inputs).logits.argmax().item()])")
    else:
        lines.append(f"outputs = model.generate(**inputs, max_new_tokens={card.max_new_tokens}, do_sample=True)")
        lines.append('print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))')
    return f"## How to use it\n\n{note}" + fenced("\n".join(lines), "python") + _folders(card)


def _encoding(card: StudentCard) -> list[str]:
    """Lines of Python that make `inputs` of the example, as inputs were made in training."""
    example = card.example or PLACEHOLDER
    if not card.conversational:
        return [f'inputs = tokenizer({_literal(example)}, return_tensors="pt")']
    messages = [{"role": "user", "content": example}] if isinstance(example, str) else example
    written = [f"    {_literal(message)}," for message in messages]
    keywords = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    given = "".join(f", {name}={_literal(value)}" for name, value in (keywords | card.chat_template_kwargs).items())
    return [
        *(["messages = [", *written, "]"] if len(messages) > 1 else [f"messages = {_literal(messages)}"]),
        f"inputs = tokenizer.apply_chat_template(messages{given})",
    ]


def _literal(value) -> str:
    """`value` as Python writes it, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return repr(value)


def _folders(card: StudentCard) -> str:
    if "discriminator" not in card.folders:
        return ""
    return "\n\nThe folder `discriminator/` holds the discriminator as it was at the end; `trl_bbkd.Discriminator` loads it."


def _making(card: StudentCard) -> str:
    blocks, listed = ["## How it was made"], list(card.hyperparameters.items())
    if listed:
        blocks.append(_settings_table(listed[:FIRST_HYPERPARAMETERS]))
    others = dict(listed[FIRST_HYPERPARAMETERS:])
    changed = card.changed_settings | card.recipe_settings
    others |= {name: value for name, value in changed.items() if name not in card.hyperparameters}
    if others:
        blocks.append(_folded("All other settings, as run", _settings_table(list(others.items()))))
    if card.command:
        blocks += ["The command:", fenced(card.command, "bash")]
    if card.settings:
        blocks += [
            f"The recipe as it was written is [`{RECIPE_NAME}`]({RECIPE_NAME}); what the command states wins.",
            _folded("The recipe", fenced(recipe_text(card.settings), "yaml")),
        ]
    versions = card.report.versions if card.report else library_versions()
    hardware = f"Trained on {escape(card.hardware)} with " if card.hardware else ""
    blocks.append(f"{hardware}{', '.join(f'{name} {version}' for name, version in versions.items())}.")
    return "\n\n".join(blocks)


def _settings_table(settings: list[tuple]) -> str:
    rows = [[escape(name), code(_value(value))] for name, value in settings]
    return "\n".join(table(["hyper-parameter", "value"], rows))


def _folded(title: str, text: str) -> str:
    """Markdown that a page shows when its title is clicked."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _value(value) -> str:
    value = getattr(value, "value", value)  # of an enumeration
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _citation(card: StudentCard) -> str:
    text = f"## Method and citation\n\n{_method(card)}: {escape(card.paper['title'])}. Trained with "
    text += "[TRL](https://github.com/huggingface/trl) and trl-bbkd."
    return f"{text}\n\n{fenced(card.paper['citation'], 'bibtex')}"


def _limits(card: StudentCard) -> str:
    lines = ["The student repeats its teacher's mistakes and adds its own."]
    if card.report:
        judge = "One run, one seed"
        if card.report.judged_metrics:
            judge += ", and a table that is worth as much as its judge"
        lines.append(judge + ".")
    if card.note:
        lines.append(card.note)
    lines.append("No licence is stated here: that of the base model and the terms of the teacher apply.")
    return "## Limits\n\n" + " ".join(lines)
