"""How many bytes a token takes, by script: what a tokenizer does well and what it does not."""

from __future__ import annotations

import hashlib
import heapq
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache

from tokenizers import Tokenizer

from megatron_trinity.data.documents import Document

CODE, DIGITS, SPACE, SYMBOLS = "code", "digits", "white space", "punctuation and symbols"

_NAMES = {"CJK": "Chinese characters", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
_SMALLEST_SHARE = 0.001  # of the bytes: figures of less say nothing


@dataclass
class Sample:
    """Beginnings of some documents, chosen by a hash so that they are of all parts of a source."""

    documents: int = 256
    characters: int = 4096
    kept: list[tuple[int, str, bool]] = field(default_factory=list)

    def offer(self, document: Document) -> None:
        """Keep it, or not; the choice depends on the documents alone, not on their order."""
        digest = hashlib.blake2b(document.split_key.encode(), digest_size=8, person=b"sample")
        rank = -int.from_bytes(digest.digest())
        if len(self.kept) == self.documents and rank <= self.kept[0][0]:
            return
        entry = (rank, document.text[: self.characters], document.is_code)
        if len(self.kept) < self.documents:
            heapq.heappush(self.kept, entry)
        else:
            heapq.heappushpop(self.kept, entry)


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """The script of a letter (Latin, Cyrillic, Chinese characters, ...), or what else it is."""
    if character.isspace():
        return SPACE
    if character.isdecimal():
        return DIGITS
    if unicodedata.category(character)[0] not in "LM":
        return SYMBOLS
    first = unicodedata.name(character, "other").split()[0].split("-")[0]
    return _NAMES.get(first, first.capitalize())


def bytes_per_token(tokenizer: Tokenizer, sample: Sample) -> dict[str, float]:
    """Bytes of text a token, of all, of code and of each script, the most frequent one first.

    A token counts for the script of its first character that is no white space. Documents whose
    file is named as code is count as code, and not for the scripts.
    """
    sizes: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for _, text, is_code in sorted(sample.kept):
        end = 0
        for start, stop in tokenizer.encode(text, add_special_tokens=False).offsets:
            # Several tokens may share a character: its bytes count once.
            size = len(text[max(start, end) : stop].encode())
            end = max(end, stop)
            kind = CODE if is_code else _script_of_token(text[start:stop])
            sizes[kind] = sizes.get(kind, 0) + size
            tokens[kind] = tokens.get(kind, 0) + 1
    total = sum(sizes.values())
    ranked = sorted(sizes, key=lambda kind: (-sizes[kind], kind))
    shown = [kind for kind in ranked if sizes[kind] >= _SMALLEST_SHARE * total]
    of_all = {"all": round(total / sum(tokens.values()), 3)} if total else {}
    return of_all | {kind: round(sizes[kind] / tokens[kind], 3) for kind in shown}


def _script_of_token(text: str) -> str:
    bare = text.lstrip()
    return script_of(bare[0]) if bare else SPACE
