"""Which bytes each token of a tokenizer stands for, read off its decoder: the same for all texts, or nothing is said."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ..errors import RecipeError


BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"
# A tokenizer that changes one of these would spell other answers than the teacher's. All are NFC, as most answers are: what
# composes accents is told answer by answer
SAMPLES = (
    "Naïve Ünïcode, UPPER lower",
    "ﬁne ① Ａ ™",
    "two  spaces",
    "a tab\tand\na line",
    "語漢字 한국 عربى",
    "🍏👩‍🚀",
    " opened",
)
ADVICE = "Name the student's own, if it is the teacher's too, or take `tokenizer` out."


class Speller:
    """
    The bytes of a tokenizer's tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer of bytes: byte-level, or SentencePiece with byte fallback.
        name (`str`):
            What it is called in errors.

    Raises:
        [`~errors.RecipeError`]: it cannot spell every text.
    """

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RecipeError(
                f"tokenizer: {name} has no tokenizer.json, by which its tokens' bytes are known. {ADVICE}"
            )
        described = json.loads(backend.to_str())
        decoder, model = described["decoder"], described["model"]
        kinds = {part["type"] for part in (decoder or {}).get("decoders", [decoder]) if part}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.names = {token.content: id_ for id_, token in added.items() if token.special}
        self.special = set(self.names.values())
        self._pieces: dict[int, bytes] = {
            id_: token.content.encode() for id_, token in added.items() if not token.special
        }
        ordinary = {id_: piece for piece, id_ in vocabulary.items() if id_ not in added}
        unknown = model.get("unk_token") or (
            model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
        )
        ordinary.pop(vocabulary.get(unknown, -1), None)
        self._byte_tokens: set[int] = set()
        if "ByteLevel" in kinds:
            self._pieces |= {
                id_: found for id_, piece in ordinary.items() if (found := _byte_level(piece)) is not None
            }
        elif "ByteFallback" in kinds:
            self._byte_tokens = {id_ for id_, piece in ordinary.items() if BYTE_TOKEN.fullmatch(piece)}
            for id_, piece in ordinary.items():
                is_byte = id_ in self._byte_tokens
                self._pieces[id_] = bytes.fromhex(piece[3:5]) if is_byte else piece.replace(SPACE, " ").encode()
        else:
            what = ", ".join(sorted(kinds)) or "nothing"
            raise RecipeError(
                f"tokenizer: {name} has no byte fallback (its decoder is {what}): it cannot spell every answer. {ADVICE}"
            )
        for sample in SAMPLES:
            spelled = self.spell(self.tokenizer(text=sample, add_special_tokens=False)["input_ids"])
            if spelled not in (sample.encode(), b" " + sample.encode()):
                shown = "nothing" if spelled is None else repr(spelled.decode(errors="replace"))
                raise RecipeError(f"tokenizer: {name} cannot spell {sample!r}: its tokens give {shown}. {ADVICE}")

    @cached_property
    def opens(self) -> bool:
        """Whether it opens a text with a space that is not there."""
        return self.spell(self.tokenizer(text="a", add_special_tokens=False)["input_ids"]) == b" a"

    def piece(self, token: int) -> bytes | None:
        """The bytes of a token; `None` of a special one, and of a number that is none."""
        return self._pieces.get(token)

    def spell(self, ids: Sequence[int]) -> bytes | None:
        """What tokens spell, if all of them are of text."""
        pieces = [self.piece(token) for token in ids]
        return None if None in pieces else b"".join(pieces)  # type: ignore[arg-type]

    def token(self, piece: bytes) -> int | None:
        """The one token of these bytes. Beside a piece of one byte, the byte that only steps in for missing pieces is none."""
        return self._tokens.get(piece)

    @cached_property
    def _tokens(self) -> dict[bytes, int]:
        found: dict[bytes, list[int]] = {}
        for id_, piece in self._pieces.items():
            found.setdefault(piece, []).append(id_)
        chosen = {}
        for piece, ids in found.items():
            ids = [id_ for id_ in ids if id_ not in self._byte_tokens] or ids
            if len(ids) == 1:
                chosen[piece] = ids[0]
        return chosen


def load_speller(name: str) -> Speller:
    """
    The tokenizer of a folder or a Hub id.

    Raises:
        [`~errors.RecipeError`]: there is none, or it cannot spell.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise RecipeError(f"tokenizer: there is no tokenizer at {name}: {why}") from None
    return Speller(tokenizer, name)


def _alphabet() -> dict[str, int]:
    """Bytes by the characters that stand for them in byte-level vocabularies: printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = _alphabet()


def _byte_level(piece: str) -> bytes | None:
    try:
        return bytes(ALPHABET[char] for char in piece)
    except KeyError:
        return None
