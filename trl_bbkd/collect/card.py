"""The data card of a set: who answered what, how, and what is not in it."""

import json
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from ..host.version import __version__
from ..reports.markdown import code, escape, table
from ..reports.redaction import is_own_host
from .answer_set import EXACT, FILE, LEFT_OUT, Survey
from .budget import Spent
from .probe import HONOURED
from .settings import FILTER_KEYS, CollectConfig


TERMS = (
    "A provider's terms say what its answers may be used for, and some forbid to train models that compete with its own. Read "
    "them before you train on this set or pass it on."
)
SAMPLING = (
    "temperature",
    "top_p",
    "max_tokens",
    "stop",
    "seed",
    "num_samples",
    "logprobs",
    "top_logprobs",
    "return_token_ids",
    "labels",
    "label_prompt",
    "teacher_confidence",
    *FILTER_KEYS,
    "extra_body",
)


def card(settings: CollectConfig, survey: Survey, spent: Spent, found: dict[str, str] | None) -> str:
    """
    Text of the set's README.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.
        survey ([`~collect.answer_set.Survey`]):
            What there is.
        spent ([`~collect.budget.Spent`]):
            By all requests of the journal.
        found (`dict[str, str]`, *optional*):
            What the endpoint does with parameters.
    """
    head = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: {FILE}"]
    head += ["tags:", "- distillation", "- synthetic", "- trl-bbkd", "---"]
    lines = [*head, f"# Answers of {escape(settings.teacher)}", "", *_what(settings, survey), ""]
    lines += ["## Parameters", "", *table(["parameter", "value"], _parameters(settings)), ""]
    if settings.system_prompt is not None:
        kept = "the set's prompts have it too" if settings.keep_system_prompt else "the set's prompts do not have it"
        lines += [f"System prompt ({kept}): {code(settings.system_prompt)}", ""]
    if found:
        rows = [[code(name), escape(what)] for name, what in found.items()]
        lines += ["What the endpoint did with them, by its answers:", "", *table(["parameter", "result"], rows), ""]
    if settings.tokenizer is not None:
        lines += [_aligned(settings.tokenizer), ""]
    lines += ["## Counts", "", *table(["what", "number"], _counts(survey)), ""]
    if survey.reasons or survey.failures:
        lines += [f"`{LEFT_OUT}`, where it was collected, lists what was left out and what failed, row by row.", ""]
    if survey.examples:
        cells = [[escape(why), code(example)] for why, examples in survey.examples.items() for example in examples]
        lines += ["The first that were left out:", "", *table(["why", "which"], cells), ""]
    lines += ["## Cost", "", *_cost(settings, survey, spent), "", "## Terms of use", "", TERMS, ""]
    return "\n".join(lines)


def _what(settings: CollectConfig, survey: Survey) -> list[str]:
    models = ", ".join(f"{code(name)} ({count:,})" for name, count in survey.models.most_common() if name)
    dates = " to ".join(dict.fromkeys(date[:10] for date in (survey.first, survey.last) if date))
    rows = "answers" if settings.labels is None else "texts with the teacher's label"
    lines = [
        f"{survey.rows:,} {rows}, one a row, collected with trl-bbkd {__version__}"
        + (f", {dates}." if dates else "."),
        "",
        f"- Teacher: {code(settings.model)} at {endpoint_family(settings.base_url)}",
    ]
    if models:
        lines.append(f"- The endpoint calls it: {models}")
    fingerprints = [name for name in survey.fingerprints if name]
    if fingerprints:
        lines.append(f"- System fingerprints: {', '.join(map(code, fingerprints[:10]))}")
    return lines


def endpoint_family(base_url: str) -> str:
    """The host of a provider; no address of a network of one's own."""
    host = urlsplit(base_url).hostname or ""
    return "a server of its user's own" if is_own_host(host) else code(host)


def _parameters(settings: CollectConfig) -> list[list[str]]:
    values = {name: getattr(settings, name) for name in SAMPLING}
    return [
        [code(name), "the endpoint's own" if value is None else code(json.dumps(value, ensure_ascii=False))]
        for name, value in values.items()
        if (value is not None and value is not False) or name in ("temperature", "top_p")
    ]


def _aligned(tokenizer: str) -> str:
    name = Path(tokenizer).name if Path(tokenizer).exists() else tokenizer
    return (
        f"`top_logprobs` has, for each token that {code(name)} makes of an answer, `ids` and `logprobs` where the teacher's token is "
        "proven to be the same bytes. `exact` says that it is at all of them; `tokens` are the tokens."
    )


def _counts(survey: Survey) -> list[list[str]]:
    rows = [("answers in the set", survey.rows)]
    rows += [(f"label {label}", count) for label, count in survey.labels.most_common()]
    rows += [(f"left out: {reason}", count) for reason, count in survey.reasons.most_common()]
    rows += [(f"failed: {kind}", count) for kind, count in survey.failures.most_common()]
    rows += [(f"log-probabilities: {state}", count) for state, count in survey.logprobs.most_common()]
    rows += [
        (f"log-probabilities by the tokenizer's tokens: {state}", count)
        for state, count in survey.aligned.most_common()
    ]
    rows += [(f"ended by: {reason}", count) for reason, count in survey.finish_reasons.most_common()]
    more = {
        "not asked": survey.not_asked,
        "rows like an earlier one, asked once": survey.duplicates,
        "prompts with several answers": survey.prompts_with_samples,
        "of these, all answers equal": survey.prompts_with_equal_samples,
    }
    return [[escape(name), f"{count:,}"] for name, count in [*rows, *((n, c) for n, c in more.items() if c)]]


def _cost(settings: CollectConfig, survey: Survey, spent: Spent) -> list[str]:
    rows = [
        ["tokens of prompts", f"{survey.prompt_tokens:,}", f"{spent.prompt:,}"],
        ["tokens of answers", f"{survey.completion_tokens:,}", f"{spent.completion:,}"],
        ["requests", "", f"{spent.requests:,}"],
    ]
    if settings.prompt_price is not None and settings.completion_price is not None:
        rows.append([f"cost, {escape(settings.currency)}", "", f"{spent.cost:,.4f}"])
    lines = table(["", "this set's requests", "all requests of the journal"], rows)
    lines += ["", "All requests: with faults that may have been paid, counted at their worst."]
    if survey.without_usage:
        lines.append(f"Answers whose tokens the endpoint did not say: {survey.without_usage:,}.")
    return lines


def warnings(settings: CollectConfig, survey: Survey, found: dict[str, str] | None) -> list[str]:
    """What whoever uses the set should know."""
    said = []
    equal = survey.prompts_with_equal_samples
    if survey.prompts_with_samples > 1 and equal == survey.prompts_with_samples and settings.temperature != 0:
        said.append(
            f"all samples of each of the {equal:,} prompts are equal: the endpoint may not sample. Agreement between them says "
            "nothing."
        )
    models = Counter({name: count for name, count in survey.models.items() if name})
    if len(models) > 1:
        said.append(f"the answers come from several models: {', '.join(models)}.")
    if (found or {}).get("seed") not in (None, HONOURED) and settings.temperature != 0:
        said.append("the endpoint does not give the same answer for the same seed, or that was not checked.")
    missing = sum(count for state, count in survey.logprobs.items() if state != "whole")
    if missing:
        said.append(f"{missing:,} answers have no log-probabilities, or not up to their end.")
    if 0 < survey.aligned.total() and 2 * survey.aligned[EXACT] < survey.aligned.total():
        said.append(
            f"of {survey.aligned.total():,} answers {survey.aligned[EXACT]:,} have exact `top_logprobs`: the teacher's tokenizer may "
            "be another than `tokenizer`, or the endpoint may not show its tokens (vLLM does with `return_token_ids: true`)."
        )
    return said
