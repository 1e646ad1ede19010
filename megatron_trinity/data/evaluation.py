"""The sets that a run evaluates on: the same samples at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from megatron_trinity.data.corpus import Corpus
from megatron_trinity.data.description import EvaluationSet
from megatron_trinity.data.manifest import split_in_manifest
from megatron_trinity.data.packing import OnePass, Packing, Piece, SequentialPacking
from megatron_trinity.data.stream import Phase, Stream
from megatron_trinity.errors import UsageError

FIXED_SEED = 0
"""Of the order of blended sets: whatever the run's seed is, runs evaluate on the same samples."""


class EvaluationSamples:
    """The first samples of a set, or all of them; every token of a pass is predicted once."""

    def __init__(self, described: EvaluationSet, seq_length: int, batch: int, limit: int) -> None:
        """Args:
        described: the set.
        seq_length: tokens of a sample.
        batch: samples that are evaluated together; the last batch is filled up with padding.
        limit: samples at most where the description does not say how many.

        Raises:
            UsageError: it has no tokens to predict.
        """
        self.name = described.name
        self._seq_length = seq_length
        self._weights = described.weights
        parts = [source.parts for source in described.sources]
        if described.weights is None:
            parts = [tuple(part for of_source in parts for part in of_source)]
        self._corpora = [Corpus(of_source) for of_source in parts]
        if min(corpus.tokens for corpus in self._corpora) < 2:
            raise UsageError(f"{_named(described)} has nothing to evaluate: 2 tokens at least")
        whole = sum(-(-(corpus.tokens - 1) // seq_length) for corpus in self._corpora)
        self.samples = min(whole, limit if described.samples is None else described.samples)
        self.iterations = -(-self.samples // batch)
        self.bytes_per_token = bytes_per_token([part.prefix for of in parts for part in of])

    def pieces(self, sample: int) -> tuple[Corpus, Sequence[Piece]]:
        """What `sample` is made of, one of `self.samples`."""
        source, index = (0, sample) if self._stream is None else self._stream[sample]
        return self._corpora[source], self._packings[source].pieces(index)

    @cached_property
    def _stream(self) -> Stream | None:
        if self._weights is None:
            return None
        phase = Phase(None, dict(enumerate(self._weights)))
        return Stream([phase], len(self._weights), FIXED_SEED)

    @cached_property
    def _packings(self) -> list[Packing]:
        if self._weights is None:
            return [OnePass(self._corpora[0].lengths, self._seq_length)]
        return [SequentialPacking(c.lengths, self._seq_length, FIXED_SEED) for c in self._corpora]


def bytes_per_token(prefixes: Sequence[str]) -> float | None:
    """Bytes of text that a token of the datasets stands for, by their manifests, if they have one.

    A dataset whose share is read counts as a whole.
    """
    tokens = text = 0
    for prefix in prefixes:
        _, counted = split_in_manifest(prefix)
        if not counted.get("tokens") or not counted.get("bytes"):
            return None
        tokens, text = tokens + counted["tokens"], text + counted["bytes"]
    return text / tokens if tokens else None


def _named(described: EvaluationSet) -> str:
    return described.name or ", ".join(source.name for source in described.sources)
