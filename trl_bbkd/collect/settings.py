"""What a recipe of `trl-bbkd collect` may say. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import parse_qsl, urlsplit


# What this package writes into a request by keys of its own
OWN_PARAMETERS = (
    "model",
    "messages",
    "tools",
    "n",
    "seed",
    "stream",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "logprobs",
    "top_logprobs",
)
AGREEMENT, MEAN_LOGPROB, VERBALISED = CONFIDENCES = ("agreement", "mean_logprob", "verbalised")
FILTER_KEYS = (
    "leave_out_refusals",
    "min_characters",
    "max_characters",
    "max_repetition",
    "languages",
    "max_similarity",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SECRET_WORDS = ("key", "token", "secret", "password", "auth", "sig")


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class CollectConfig:
    r"""
    Parameters of a collection of a teacher's answers.

    Parameters:
        base_url (`str`):
            Address of an endpoint that is compatible with OpenAI's, such as `https://api.openai.com/v1`; requests go to
            `<base_url>/chat/completions`.
        model (`str`):
            The teacher, by the endpoint's name for it.
        output_dir (`str`):
            Folder of the set: `train.parquet`, its card, what was left out, and the journal.
        dataset_name (`str`):
            Prompts: a file, a folder or a Hub id, as for a training.
        dataset_config (`str`, *optional*):
            Configuration of a data set of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split whose prompts are asked.
        prompt_column (`str`, *optional*):
            Column of the prompts, texts or messages. By default `prompt`, or else `messages`.
        max_prompts (`int`, *optional*):
            Ask the first so many prompts alone.
        teacher_name (`str`, *optional*):
            The teacher's name in the set and its card, the model's by default.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key; `null` where the endpoint needs none.
        api_key_header (`str`, *optional*, defaults to `"Authorization"`):
            Header that carries the key: after `Bearer` in `Authorization`, alone in any other.
        system_prompt (`str`, *optional*):
            Put before each conversation that has no system message of its own.
        keep_system_prompt (`bool`, *optional*, defaults to `False`):
            Whether the set's prompts have `system_prompt` too: whether the student shall be used with it.
        num_samples (`int`, *optional*, defaults to `1`):
            Answers to each prompt.
        temperature, top_p (`float`, *optional*):
            Of the sampling; the endpoint's own by default.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer, reasoning included. Longer ones are cut, and paid.
        max_tokens_name (`str`, *optional*, defaults to `"max_tokens"`):
            How the endpoint calls it: `max_tokens`, or `max_completion_tokens`.
        stop (`list[str]`, *optional*):
            Texts that end an answer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of a prompt's first answer; the next has the next one. `null` sends none.
        logprobs (`bool`, *optional*, defaults to `False`):
            Ask for the log-probability of each token of an answer.
        top_logprobs (`int`, *optional*):
            Ask for those of so many alternatives at each token too.
        return_token_ids (`bool`, *optional*, defaults to `False`):
            Ask for token ids, which vLLM gives; other endpoints may refuse it.
        tokenizer (`str`, *optional*):
            Folder or Hub id of the student's tokenizer, if it is the teacher's too: the set has log-probabilities by its tokens,
            in the column `top_logprobs`, which Bayes-KD reads.
        labels (`list[str]`, *optional*):
            Ask which of these labels a text has, for LLKD: the set has `text`, `label`, `teacher_confidence` and
            `teacher_probs`, one row a text. `logprobs` with `top_logprobs`, several samples or `teacher_confidence:
            verbalised` say how sure the teacher is.
        label_answers (`str`, *optional*, defaults to `"letters"`):
            Whether the teacher answers by a label's letter or by its name: `letters` or `names`.
        label_prompt (`str`, *optional*):
            What is asked, with `{text}` and `{labels}`; by default a short question.
        teacher_confidence (`str`, *optional*):
            How sure the teacher is of an answer, as a column: `agreement`, the share of a prompt's answers that are the same;
            `mean_logprob`, the exponential of the mean log-probability of its tokens; or `verbalised`, what it says when it is
            asked. Answers without one are left out.
        extra_body (`dict[str, Any]`, *optional*):
            Further parameters of the request, such as `{"reasoning_effort": "low"}`.
        conversational (`bool`, *optional*):
            Whether the set has messages (`true`) or texts (`false`); by default what the prompts are.
        keep_cut_answers (`bool`, *optional*, defaults to `False`):
            Whether answers that were cut at `max_tokens` go into the set.
        keep_filtered_answers (`bool`, *optional*, defaults to `False`):
            Whether answers that the provider's content filter touched go into the set.
        leave_out_refusals (`bool`, *optional*, defaults to `False`):
            Whether answers that open as a refusal does are left out of the set.
        min_characters, max_characters (`int`, *optional*):
            Leave shorter and longer answers out.
        max_repetition (`float`, *optional*):
            Leave answers out of whose 4-grams of words a larger share is repeated.
        languages (`list[str]`, *optional*):
            Leave answers of other languages out, such as `[en, de]`. It needs the extra `filters`.
        max_similarity (`float`, *optional*):
            Leave answers out that are as similar, or more, to an earlier one: Jaccard similarity of their 3-grams of words, by
            sketches, which miss some. It needs the extra `filters`.
        concurrency (`int`, *optional*, defaults to `16`):
            Requests in flight at most. Fewer are sent while the endpoint says that they are too many.
        requests_per_minute, tokens_per_minute (`int`, *optional*):
            Limits of the endpoint, kept here.
        request_timeout (`float`, *optional*, defaults to `600`):
            Seconds until a request is given up.
        max_retries (`int`, *optional*, defaults to `5`):
            Further attempts after a fault that may pass.
        max_requests, max_total_tokens (`int`, *optional*):
            The journal's requests, and tokens of prompts and answers, are never more.
        max_cost (`float`, *optional*):
            The journal's cost is never more. It needs the prices.
        prompt_price, completion_price, cached_prompt_price (`float`, *optional*):
            Of a million tokens. Cached ones cost as others by default.
        currency (`str`, *optional*, defaults to `"USD"`):
            Of the prices.
        retry_failed (`bool`, *optional*, defaults to `False`):
            Ask again what failed in an earlier run.
        journal (`str`, *optional*):
            File of the journal, `journal.sqlite` in `output_dir` by default.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Send the set and its card to the Hub, as a data set, with the token of `hf auth login` or `HF_TOKEN`.
        hub_dataset_id (`str`, *optional*):
            Repository of the set, such as `me/answers`.
        hub_private_repo (`bool`, *optional*, defaults to `True`):
            Whether the repository, where there is none yet, is made private.
    """

    base_url: str = field(metadata=_help("Address of the endpoint, such as https://api.openai.com/v1."))
    model: str = field(metadata=_help("The teacher, by the endpoint's name for it."))
    output_dir: str = field(metadata=_help("Folder of the set, its card and the journal."))
    dataset_name: str = field(metadata=_help("Prompts: a file, a folder or a Hub id."))
    dataset_config: str | None = field(default=None, metadata=_help("Configuration of a data set of the Hub."))
    dataset_train_split: str = field(default="train", metadata=_help("Split whose prompts are asked."))
    prompt_column: str | None = field(
        default=None, metadata=_help("Column of the prompts: `prompt`, or else `messages`, by default.")
    )
    max_prompts: int | None = field(default=None, metadata=_help("Ask the first so many prompts alone."))
    teacher_name: str | None = field(default=None, metadata=_help("The teacher's name in the set; the model's."))
    api_key_env: str | None = field(
        default="OPENAI_API_KEY", metadata=_help("Environment variable that holds the key; null for none.")
    )
    api_key_header: str = field(default="Authorization", metadata=_help("Header that carries the key."))
    system_prompt: str | None = field(
        default=None, metadata=_help("Put before each conversation that has no system message.")
    )
    keep_system_prompt: bool = field(default=False, metadata=_help("Whether the set's prompts have it too."))
    num_samples: int = field(default=1, metadata=_help("Answers to each prompt."))
    temperature: float | None = field(default=None, metadata=_help("Of the sampling; the endpoint's own."))
    top_p: float | None = field(default=None, metadata=_help("Of the sampling; the endpoint's own."))
    max_tokens: int = field(default=1024, metadata=_help("Longest answer, reasoning included."))
    max_tokens_name: str = field(
        default="max_tokens",
        metadata={**_help("How the endpoint calls it."), "choices": ("max_tokens", "max_completion_tokens")},
    )
    stop: list[str] | None = field(default=None, metadata=_help("Texts that end an answer."))
    seed: int | None = field(default=0, metadata=_help("Of a prompt's first answer; null sends none."))
    logprobs: bool = field(default=False, metadata=_help("Ask for the log-probability of each token."))
    top_logprobs: int | None = field(default=None, metadata=_help("Alternatives at each token to ask for."))
    return_token_ids: bool = field(default=False, metadata=_help("Ask for token ids, which vLLM gives."))
    tokenizer: str | None = field(
        default=None, metadata=_help("The student's tokenizer, by whose tokens the set has log-probabilities.")
    )
    labels: list[str] | None = field(default=None, metadata=_help("Ask which of these labels a text has, for LLKD."))
    label_answers: str = field(
        default="letters",
        metadata={**_help("Whether a label is answered by its letter or its name."), "choices": ("letters", "names")},
    )
    label_prompt: str | None = field(default=None, metadata=_help("What is asked, with {text} and {labels}."))
    teacher_confidence: str | None = field(
        default=None, metadata={**_help("How sure the teacher is, as a column."), "choices": CONFIDENCES}
    )
    extra_body: dict[str, Any] | None = field(default=None, metadata=_help("Further parameters of the request."))
    conversational: bool | None = field(
        default=None, metadata=_help("Whether the set has messages or texts; what the prompts are.")
    )
    keep_cut_answers: bool = field(default=False, metadata=_help("Whether answers cut at max_tokens are kept."))
    keep_filtered_answers: bool = field(default=False, metadata=_help("Whether filtered answers are kept."))
    leave_out_refusals: bool = field(default=False, metadata=_help("Whether answers that refuse are left out."))
    min_characters: int | None = field(default=None, metadata=_help("Leave shorter answers out."))
    max_characters: int | None = field(default=None, metadata=_help("Leave longer answers out."))
    max_repetition: float | None = field(
        default=None, metadata=_help("Leave answers out of whose 4-grams a larger share is repeated.")
    )
    languages: list[str] | None = field(default=None, metadata=_help("Leave answers of other languages out."))
    max_similarity: float | None = field(
        default=None, metadata=_help("Leave answers out that are so similar to an earlier one.")
    )
    concurrency: int = field(default=16, metadata=_help("Requests in flight at most."))
    requests_per_minute: int | None = field(default=None, metadata=_help("Limit of the endpoint."))
    tokens_per_minute: int | None = field(default=None, metadata=_help("Limit of the endpoint."))
    request_timeout: float = field(default=600.0, metadata=_help("Seconds until a request is given up."))
    max_retries: int = field(default=5, metadata=_help("Further attempts after a fault that may pass."))
    max_requests: int | None = field(default=None, metadata=_help("Cap on the journal's requests."))
    max_total_tokens: int | None = field(default=None, metadata=_help("Cap on the journal's tokens."))
    max_cost: float | None = field(default=None, metadata=_help("Cap on the journal's cost; needs the prices."))
    prompt_price: float | None = field(default=None, metadata=_help("Of a million tokens of prompts."))
    completion_price: float | None = field(default=None, metadata=_help("Of a million tokens of answers."))
    cached_prompt_price: float | None = field(default=None, metadata=_help("Of a million cached tokens."))
    currency: str = field(default="USD", metadata=_help("Of the prices."))
    retry_failed: bool = field(default=False, metadata=_help("Ask again what failed in an earlier run."))
    journal: str | None = field(default=None, metadata=_help("File of the journal."))
    push_to_hub: bool = field(default=False, metadata=_help("Send the set to the Hub, as a data set."))
    hub_dataset_id: str | None = field(default=None, metadata=_help("Repository of the set, such as me/answers."))
    hub_private_repo: bool = field(default=True, metadata=_help("Whether a new repository is private."))

    def __post_init__(self):
        for name in ("base_url", "model", "output_dir", "dataset_name"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: it is empty.")
        _check_address(self.base_url)
        self._check_numbers()
        if self.max_cost is not None and (self.prompt_price is None or self.completion_price is None):
            raise ValueError(
                "max_cost: a cap on money needs `prompt_price` and `completion_price`, of a million tokens each."
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: endpoints give them with `logprobs: true` alone. Add it.")
        if self.return_token_ids and not self.logprobs:
            raise ValueError("return_token_ids: token ids come with `logprobs: true`. Add it.")
        if self.push_to_hub and not self.hub_dataset_id:
            raise ValueError("push_to_hub: it needs `hub_dataset_id`, the repository of the set, such as me/answers.")
        if self.tokenizer is not None and not self.logprobs:
            raise ValueError(
                "tokenizer: there are log-probabilities by its tokens with `logprobs: true` alone. Add it."
            )
        self._check_confidence()
        if self.labels is not None:
            self._check_labels(self.labels)
        elif self.label_prompt is not None:
            raise ValueError("label_prompt: it asks for one of `labels`. Name them.")
        for name in self.extra_body or ():
            if name in OWN_PARAMETERS:
                advice = "answers are read whole" if name == "stream" else "a recipe has a key for it"
                raise ValueError(f"extra_body: take {name!r} out: {advice}.")
        if not (self.api_key_env is None or self.api_key_env.isidentifier()):
            # Not repeated: it may be the key
            raise ValueError(
                "api_key_env: it is the name of an environment variable, such as OPENAI_API_KEY, not a key."
            )

    def _check_confidence(self):
        kind = self.teacher_confidence
        if kind == AGREEMENT and self.num_samples < 2:
            raise ValueError(
                "teacher_confidence: agreement needs several answers to a prompt. Set num_samples to 2 or more."
            )
        if kind == MEAN_LOGPROB and not self.logprobs:
            raise ValueError("teacher_confidence: mean_logprob needs `logprobs: true`. Add it.")
        if kind == VERBALISED and self.tokenizer is not None:
            raise ValueError(
                "teacher_confidence: of what the teacher says, verbalised takes the last line off, which `top_logprobs` would have. "
                "Take tokenizer out."
            )

    def _check_labels(self, labels: list[str]):
        if len(labels) < 2 or not all(label.strip() for label in labels):
            raise ValueError("labels: expected two names or more, none of them empty.")
        plain = [" ".join(label.casefold().split()) for label in labels]
        twice = next((label for label, name in zip(labels, plain, strict=True) if plain.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"labels: {twice!r} is there twice.")
        by_letter = self.label_answers == "letters"
        if by_letter and len(labels) > len(LETTERS):
            raise ValueError(f"labels: letters are for {len(LETTERS)} at most. Set `label_answers: names`.")
        if self.label_prompt is not None and not all(part in self.label_prompt for part in ("{text}", "{labels}")):
            raise ValueError(
                "label_prompt: it needs {text} and {labels}, which stand for a row's text and the labels."
            )
        if self.logprobs and (self.top_logprobs is None or not by_letter):
            raise ValueError(
                "labels: log-probabilities of labels need `top_logprobs: 20` and `label_answers: letters`."
            )
        ways = (self.logprobs, self.num_samples > 1, self.teacher_confidence == VERBALISED)
        if sum(ways) != 1 or self.teacher_confidence == MEAN_LOGPROB:
            raise ValueError(
                "labels: one thing has to say how sure the teacher is: `logprobs: true` with `top_logprobs: 20`, or `num_samples: 5`, "
                "or `teacher_confidence: verbalised`."
            )
        others = ("tokenizer", "conversational", "keep_cut_answers", "keep_filtered_answers", "keep_system_prompt")
        for name in (*others, *FILTER_KEYS):
            if getattr(self, name):
                raise ValueError(f"{name}: a set of labels has no answers as texts. Take it out.")

    def _check_numbers(self):
        limits = ("max_prompts", "requests_per_minute", "tokens_per_minute", "max_requests", "max_total_tokens")
        lengths = ("min_characters", "max_characters")
        for name in ("num_samples", "max_tokens", "concurrency", *lengths, *limits):
            value = getattr(self, name)
            if value is not None and value < 1:
                advice = " Take it out for no limit." if name in limits else ""
                raise ValueError(f"{name}: expected 1 or more, got {value}.{advice}")
        for name in ("max_cost", "request_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value:g}.")
        for name in ("prompt_price", "completion_price", "cached_prompt_price", "temperature", "max_retries"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {value:g}.")
        if self.top_logprobs is not None and not 1 <= self.top_logprobs <= 20:
            raise ValueError(f"top_logprobs: expected 1 to 20, got {self.top_logprobs}.")
        for name in ("max_repetition", "max_similarity"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {value:g}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p:g}.")

    @property
    def teacher(self) -> str:
        """The teacher's name in the set: of a server's path to its model, the last part."""
        return self.teacher_name or (PurePath(self.model).name if self.model.startswith("/") else self.model)


def _check_address(base_url: str) -> None:
    """Refuse an address that is none, or that holds a secret, which is not repeated."""
    try:
        parts = urlsplit(base_url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_fits = urlsplit(""), False
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "base_url: it holds a user or a password. Take them out, and put the key into the environment."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_fits:
        raise ValueError("base_url: expected an address such as https://api.openai.com/v1.")
    secret = next(
        (name for name, _ in parse_qsl(parts.query) if any(word in name.lower() for word in SECRET_WORDS)), None
    )
    if secret:
        raise ValueError(
            f"base_url: {secret!r} looks like a secret. Take it out, and put the key into the environment."
        )
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError("base_url: leave /chat/completions out, which is added.")
