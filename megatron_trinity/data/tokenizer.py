"""Byte-level BPE with Trinity's pre-tokenizer, saved as a Hugging Face tokenizer directory.

Source of the pre-tokenizer: the Trinity report names the stages (digits, script-aware isolation,
bytes); the public llama.cpp port of the AfMoE tokenizer has the patterns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_trinity.data import documents, manifest
from megatron_trinity.data.documents import DEFAULT_VALID_FRACTION, Document, SkipReport
from megatron_trinity.data.formats import Kind
from megatron_trinity.data.listing import (
    expand_lists,
    refuse_output_inside_sources,
    source_files,
    survey,
)
from megatron_trinity.data.records import iterate_documents
from megatron_trinity.data.tokenizer_report import Sample, bytes_per_token
from megatron_trinity.errors import TrinityError, UsageError

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PAD = "<|pad|>"

SPECIAL_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, IM_START, IM_END, PAD)
"""In the order of their ids, from 0. The chat tokens are reserved: pretraining never emits them.

The published chat tokenizers end a turn, and name as eos, `<|im_end|>`. Here eos is
`<|end_of_text|>`: Megatron takes eos as the end-of-document token, and documents are no turns.
"""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Turns of a chat, as transformers and servers write them; exports carry it along."""

README = f"""\
# Tokenizer

Byte-level BPE, read by `AutoTokenizer.from_pretrained`.

## Names of special tokens in text

`AutoTokenizer` turns `{END_OF_TEXT}` and the other names of special tokens into their ids wherever
they stand, in a document or in what a user types as well. To keep such text as text:

```python
tokenizer(text, split_special_tokens=True)
```

Data preparation reads documents in that way. `tokenizer.apply_chat_template(messages)` writes the
special tokens of a chat; check or escape what users write before it.
"""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
)
MANIFEST_FILE = "training_manifest.json"

# A run of decimal digits, then groups of three aligned from its right: 1234567 -> 1|234|567.
# Two splits, because one that looks ahead from each group to the end of the run is quadratic in its
# length. In the second one `\A` and `\z` are the ends of the run, which the first has cut out.
DIGIT_RUN = r"\d+"
DIGIT_GROUP = r"\A\d{1,2}(?=(?:\d{3})++\z)|\d{3}"

# Scripts written without spaces between words, and Korean, are kept apart from all others.
ISOLATED_RANGES = (
    ("\u4e00", "\u9fff"),  # CJK unified ideographs
    ("\u3400", "\u4dbf"),  # extension A
    # The port starts here; U+F900, which normalises to this, was probably meant. Kept as published:
    # it also isolates Yi, Vai, Javanese, Hangul and the private use area.
    ("\u8c48", "\ufaff"),
    ("\u3040", "\u309f"),  # Hiragana
    ("\u30a0", "\u30ff"),  # Katakana
    ("\uff65", "\uff9f"),  # half-width Katakana
    ("\u2f00", "\u2fdf"),  # Kangxi radicals
    ("\u0e40", "\u0e7f"),  # Thai from its leading vowels on: the consonants before are not in it
    ("\u0e80", "\u0eff"),  # Lao
    ("\u1780", "\u17ff"),  # Khmer
    ("\u1000", "\u109f"),  # Myanmar
    ("\uaa60", "\uaa7f"),  # Myanmar extended A
    ("\ua9e0", "\ua9ff"),  # Myanmar extended B
    ("\uac00", "\ud7af"),  # Hangul syllables
    ("\u1100", "\u11ff"),  # Hangul Jamo
)
ISOLATED_SCRIPTS = "[" + "".join(f"{low}-{high}" for low, high in ISOLATED_RANGES) + "]+"

WORDS = "|".join(
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",  # .append  'll  _name
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the space before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation, with the line's end after it
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # all of the white space but its last, which goes to the word after
        r"\s+",
    )
)


def build_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Trinity's pre-tokenizer: digit groups, isolated scripts, words, then bytes."""
    patterns = (DIGIT_RUN, DIGIT_GROUP, ISOLATED_SCRIPTS, WORDS)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`; the result depends on nothing else.

    All 256 bytes are tokens, so that any text comes back exactly. A pair is merged when it occurs
    at least twice: with little text the vocabulary ends up smaller than `vocab_size`.

    Raises:
        UsageError: `vocab_size` has no room for the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = build_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer` into an existing `directory` as Hugging Face's AutoTokenizer reads it."""
    named = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_prefix_space": False,
        # Cleaning up would lose the spaces before punctuation.
        "clean_up_tokenization_spaces": False,
        # No length of its own: what a model can read is said by the model.
        "model_max_length": 10**30,
    }
    tokenizer.save(str(directory / TOKENIZER_FILES[0]))
    texts = (json.dumps(config, indent=2) + "\n", json.dumps(named, indent=2) + "\n")
    for name, text in zip(TOKENIZER_FILES[1:], (*texts, CHAT_TEMPLATE, README), strict=True):
        (directory / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TokenizerRequest:
    """What to train a tokenizer on. `valid_fraction`: the share of documents it must not see."""

    sources: tuple[str, ...]
    output: Path
    vocab_size: int
    glob: str = "**/*"
    json_key: str = "text"
    valid_fraction: float = DEFAULT_VALID_FRACTION
    overwrite: bool = False
    format: Kind | None = None


def make_tokenizer(request: TokenizerRequest) -> tuple[dict[str, Any], bool]:
    """Train a tokenizer into `request.output`; return its manifest and whether it is new.

    Nothing is done where the output was already made from the same sources with the same settings.

    Raises:
        UsageError: a source is missing, a number is out of range.
        TrinityError: no document is left to train on, or the output holds something else.
    """
    if not 0.0 <= request.valid_fraction < 1.0:
        raise UsageError(f"--valid-fraction {request.valid_fraction} is not in [0, 1)")
    sources = expand_lists(request.sources)
    refuse_output_inside_sources(request.output, sources)
    report = SkipReport()
    surveyed = survey(source_files(sources, request.glob, report, request.format))
    asked = {
        "sources": list(request.sources),
        "glob": request.glob,
        "json_key": request.json_key,
        "valid_fraction": request.valid_fraction,
        "vocab_size": request.vocab_size,
        "fingerprint": surveyed.fingerprint,
        **({"format": request.format.value} if request.format else {}),
    }
    targets = [request.output / name for name in TOKENIZER_FILES]
    manifest_path = request.output / MANIFEST_FILE
    if not request.overwrite:
        present = manifest.read_manifest(manifest_path)
        if present is not None and present.get("request") == asked and _is_intact(present, targets):
            return present, False
        manifest.refuse_existing([*targets, manifest_path], "was not made by this same request")

    seen = _Seen()
    files = source_files(sources, request.glob, SkipReport(), request.format)
    texts = seen.training_texts(
        iterate_documents(files, request.json_key, report), request.valid_fraction
    )
    tokenizer = train_tokenizer(texts, request.vocab_size)
    if seen.documents == 0:
        left_out = "".join(f"; {line}" for line in report.summary(shown=1))
        raise TrinityError(f"no documents to train on in {', '.join(request.sources)}{left_out}")
    try:
        with manifest.staging_directory(request.output, "tokenizer") as staging:
            save_tokenizer(tokenizer, staging)
            made = {
                "format": 1,
                "request": asked,
                "vocab_size": tokenizer.get_vocab_size(),
                "sha256": {n: manifest.sha256_of_file(staging / n) for n in TOKENIZER_FILES},
                "bytes_per_token": bytes_per_token(tokenizer, seen.sample),
                "documents": seen.documents,
                "bytes": seen.bytes,
                "skipped": report.as_dict(),
            }
            staged = {staging / path.name: path for path in targets}
            manifest.publish(staged, made, manifest_path, staging)
    except OSError as error:
        raise TrinityError(f"cannot write {request.output}: {error.strerror or error}") from error
    return made, True


@dataclass
class _Seen:
    """Counts what passes through to the trainer."""

    documents: int = 0
    bytes: int = 0
    sample: Sample = field(default_factory=Sample)

    def training_texts(self, found: Iterable[Document], valid_fraction: float) -> Iterator[str]:
        for document in found:
            if documents.assign_split(document.split_key, valid_fraction) == "train":
                self.documents += 1
                self.bytes += document.text_bytes
                self.sample.offer(document)
                yield document.text


def _is_intact(present: dict[str, Any], targets: Iterable[Path]) -> bool:
    hashes = present.get("sha256", {})  # of an older tokenizer it names fewer files
    return TOKENIZER_FILES[0] in hashes and all(
        path.is_file() and hashes[path.name] == manifest.sha256_of_file(path)
        for path in targets
        if path.name in hashes
    )
