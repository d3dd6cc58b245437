"""Tiny tokenizers of two kinds, and what servers show of an answer's tokens with them."""

import json
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.collect.server import TeacherServer


ENGLISH = [
    "The sky is blue, and at night it is dark.",
    "An apple is red. A cherry is red too.",
    "Hello, cat! How are you today? The apple is blue.",
    "def add(first, second):\n    return first + second\n",
]
MIXED = [
    *ENGLISH,
    "Der Himmel über Zürich ist blau.",
    "日本語の空は青い。",
    "🍏 is a green apple, 🍎 a red one.",
    "naïve café",
]
END, BEGIN = "<|im_end|>", "<|im_start|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _fast(tokenizer):
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (BEGIN, END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=BEGIN, chat_template=TEMPLATE)


def byte_level(texts=MIXED, size=420):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_bpe(texts=MIXED, size=200, byte_fallback=True):
    """As Llama 2's: a space before the text, bytes for what has no piece."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, show_progress=False)
    learned.train_from_iterator([f"▁{text}" for text in texts], trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", *BYTES, *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


def unigram(texts=MIXED, size=120):
    """As Gemma's: no space before the text."""
    learned = Tokenizer(models.Unigram())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=size, show_progress=False, unk_token="<unk>")
    )
    found = json.loads(learned.to_str())["model"]["vocab"]
    vocabulary = [("<unk>", -20.0), *((byte, -15.0) for byte in BYTES)]
    vocabulary += [(piece, score) for piece, score in found if piece != "<unk>"]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(tokenizer)


class ShowingServer(TeacherServer):
    """
    A server that shows the tokens of its answers.

    Args:
        speller (`Speller`): its tokenizer.
        style (`str`): how it shows them: see [`Teacher`].
    """

    def __init__(self, speller, style="bytes", **settings):
        super().__init__(**settings)
        self.speller, self.style = speller, style

    def _choice(self, body, index, fault):
        choice = super()._choice(body, index, fault)
        text = choice["message"]["content"]
        if choice["logprobs"] is None or not text:
            return choice
        style = "ids" if body.get("return_tokens_as_token_ids") else self.style
        ids = self.speller.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        shown = Teacher(self.speller, style, random.Random(text), alternatives=body.get("top_logprobs") or 0)
        return choice | {"logprobs": shown.answer(ids, text)["logprobs"]}


class Teacher:
    """
    Tokens of a text as a server shows them, each log-probability a number of its own, by which it is found again.

    Args:
        speller (`Speller`): the teacher's tokenizer.
        style (`str`): `"bytes"`, true ones; `"replaced"`, what is cut comes as replacement characters; `"vllm"`, what is cut comes
            as nothing, and whole with its last token; `"ids"`, numbers for texts, as vLLM gives them on request.
        shows_opening (`bool`): whether the space is shown with which the tokenizer opens a text.
    """

    def __init__(self, speller, style, dice=None, shows_opening=False, ends=True, alternatives=3):
        self.speller, self.style, self.shows_opening, self.ends = speller, style, shows_opening, ends
        self.dice, self.count = dice or random.Random(0), alternatives
        # No model gives a probability to the byte of a letter that has a piece
        self.ordinary = [id_ for id_ in range(600) if (piece := speller.piece(id_)) and speller.token(piece) == id_]

    def answer(self, ids, text):
        """A choice, the true span of each token by its log-probability, and the true token of each alternative by its own."""
        pieces = [self.speller.piece(id_) for id_ in ids]
        lead = len(b"".join(pieces)) - len(text.encode())
        self.chosen, self.others, entries = {}, {}, []
        pending, at = b"", -lead
        for position, (id_, piece) in enumerate(zip(ids, pieces, strict=True)):
            opens = position == 0 and lead == 1 and not self.shows_opening
            entries.append(self._entry(id_, pending, opens, -1.0 - position / 4096))
            self.chosen[entries[-1]["logprob"]] = (id_, (at, at := at + len(piece)))
            pending = self._left(pending + piece)
        if self.ends:
            end = self.speller.names[END]
            entries.append(self._entry(end, b"", False, -0.5))
            self.chosen[-0.5] = (end, None)
        return {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": entries},
            "finish_reason": "stop" if self.ends else "length",
        }

    def _entry(self, id_, pending, opens, logprob):
        entry = self._shown(id_, pending, opens) | {"logprob": logprob}
        others = self.dice.sample([one for one in [*self.ordinary, *self.speller.special] if one != id_], self.count)
        entry["top_logprobs"] = [dict(entry)] if self.count else []
        if self.style == "ids" and self.count:
            entry["top_logprobs"][0]["bytes"] = list(entry["token"].encode())
        for other in others:
            shown = self._shown(other, pending, opens) | {"logprob": -9.0 - len(self.others) / 4096}
            if self.style == "ids":
                shown["bytes"] = list(shown["token"].encode())  # of the number as it is written
            self.others[shown["logprob"]] = other
            entry["top_logprobs"].append(shown)
        return entry

    def _shown(self, id_, pending, opens):
        piece = self.speller.piece(id_)
        if piece is None:
            name = next(name for name, number in self.speller.names.items() if number == id_)
            return {"token": f"token_id:{id_}" if self.style == "ids" else name, "bytes": list(name.encode())}
        piece = piece.removeprefix(b" ") if opens else piece
        replaced = piece.decode(errors="replace")
        if self.style == "bytes":
            return {"token": replaced, "bytes": list(piece)}
        if self.style == "replaced":
            return {"token": replaced, "bytes": list(replaced.encode())}
        whole = "" if self._left(pending + piece) else (pending + piece).decode(errors="replace")
        return {"token": f"token_id:{id_}" if self.style == "ids" else whole, "bytes": list(whole.encode())}

    @staticmethod
    def _left(text):
        try:
            text.decode()
        except UnicodeDecodeError:
            return text
        return b""


def split_otherwise(ids, speller, dice):
    """The same text in other tokens of the vocabulary, as sampling finds them now and then."""
    found = []
    for id_ in ids:
        piece = speller.piece(id_)
        cuts = [at for at in range(1, len(piece)) if speller.token(piece[:at]) and speller.token(piece[at:])]
        if cuts and dice.random() < 0.3:
            at = dice.choice(cuts)
            found += [speller.token(piece[:at]), speller.token(piece[at:])]
        else:
            found.append(id_)
    return found
