"""A description, made ready to be read: each sample of the run by its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_trinity.data.corpus import Corpus
from megatron_trinity.data.description import Description, PlannedPhase, Source
from megatron_trinity.data.packing import Packing, Piece
from megatron_trinity.data.packings import PACKINGS
from megatron_trinity.data.stream import Phase, Stream
from megatron_trinity.errors import UsageError


@dataclass(frozen=True)
class Given:
    """What a source has given."""

    name: str
    tokens: int
    documents: int
    epochs: float


class Plan:
    """What a run trains on, as a pure function of the description, the length and the seed.

    Only sizes are read until a sample is asked for; the documents of a source then cost 28 bytes
    each, in each process that reads.
    """

    def __init__(self, description: Description, seq_length: int, seed: int) -> None:
        """Raises:
        UsageError: a source has no tokens.
        """
        self._sources = description.sources
        self._seq_length, self._seed = seq_length, seed
        self._corpora = [Corpus(source.parts, source.length_bias, seed) for source in self._sources]
        for source, corpus in zip(self._sources, self._corpora, strict=True):
            if corpus.tokens == 0:
                raise UsageError(f"{source.name} has no tokens: its documents are all empty")
        self._packings: dict[int, Packing] = {}
        self._kinds: dict[int, PlannedPhase] = {}
        phases = [self._phase(phase) for phase in description.phases]
        self.stream = Stream(phases, len(self._sources), seed)

    def _phase(self, phase: PlannedPhase) -> Phase:
        numbers = {source.name: number for number, source in enumerate(self._sources)}
        weights = phase.weights or {
            source.name: float(corpus.tokens)
            for source, corpus in zip(self._sources, self._corpora, strict=True)
        }
        self._kinds |= {numbers[name]: phase for name in weights}
        # A phase ends with a whole sample.
        samples = None if phase.tokens is None else -(-phase.tokens // self._seq_length)
        return Phase(samples, {numbers[name]: weight for name, weight in weights.items()})

    @property
    def padded(self) -> bool:
        """Whether samples may end in padding."""
        return any(PACKINGS[phase.packing].padding for phase in self._kinds.values())

    def pieces(self, sample: int) -> tuple[Corpus, Sequence[Piece]]:
        """What `sample` of the run is made of.

        Raises:
            TrinityError: the description ends before it.
        """
        source, index = self.stream[sample]
        return self._corpora[source], self._packing(source).pieces(index)

    def _packing(self, source: int) -> Packing:
        if source not in self._packings:
            phase = self._kinds[source]
            self._packings[source] = PACKINGS[phase.packing].make(
                self._corpora[source].lengths, self._seq_length, self._seed, **phase.options
            )
        return self._packings[source]

    def given(self, samples: int) -> list[Given]:
        """What each source has given to the first `samples` of the run, by the samples' length."""
        found = []
        numbers = {source.name: number for number, source in enumerate(self._sources)}
        counts = self.stream.given(samples).tolist()
        for source, corpus, count in zip(self._sources, self._corpora, counts, strict=True):
            epochs = count / self._of_an_epoch(numbers[source.name])
            tokens = round(epochs * corpus.tokens)
            found.append(Given(source.name, tokens, round(epochs * corpus.documents), epochs))
        return found

    def check_length(self, samples: int) -> None:
        """Refuse a run of `samples` that the data does not last for.

        Raises:
            UsageError: the phases end before, or a source would be read more often than it may.
        """
        end = self.stream.end
        if end is not None and samples > end:
            raise UsageError(
                f"the phases of the data end after {end * self._seq_length} tokens, and the run "
                f"takes {samples * self._seq_length}; leave out the tokens of the last phase, add "
                "one, or train shorter"
            )
        counts = self.stream.given(samples).tolist()
        for number, (source, count) in enumerate(zip(self._sources, counts, strict=True)):
            if source.epochs is not None and count > self._most(number, source.epochs):
                lasts = self._lasts(number, source, samples)
                raise UsageError(
                    f"{source.name} may be read {source.epochs:g} times, which lasts for "
                    f"{lasts * self._seq_length} tokens of the run, and the run takes "
                    f"{samples * self._seq_length}; give it more epochs, a lower weight, or train "
                    "shorter"
                )

    def _most(self, number: int, epochs: float) -> int:
        """Samples of a source in so many epochs."""
        return math.floor(epochs * self._of_an_epoch(number))

    def _of_an_epoch(self, number: int) -> float:
        """Samples of an epoch of a source, as a fraction; where they are padded, of the first."""
        if number in self._kinds and PACKINGS[self._kinds[number].packing].padding:
            return len(self._packing(number))
        return self._corpora[number].tokens / self._seq_length

    def _lasts(self, number: int, source: Source, samples: int) -> int:
        most = self._most(number, source.epochs or math.inf)
        low, high = 0, samples  # lasts for `low`, not for `high`
        while high - low > 1:
            middle = (low + high) // 2
            if self.stream.given(middle)[number] > most:
                high = middle
            else:
                low = middle
        return low

    def notes(self) -> list[str]:
        """What is worth knowing before the run starts."""
        return [
            f"{source.name} has {corpus.tokens} tokens, less than one sequence of "
            f"{self._seq_length}: each repeats it"
            for source, corpus in zip(self._sources, self._corpora, strict=True)
            if corpus.tokens <= self._seq_length
        ]
