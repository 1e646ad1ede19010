"""The Random Sequential Document Buffer of the Trinity report: documents are read in turns.

Sequential packing lets a long document fill sample after sample, which biases whole batches to it.
Here many documents are open at once, each with a read head. A sample is filled by picking one of
them at random and reading on from its head until it ends or the sample is full, and so on. A long
document thus goes on in later samples, at random. Documents are never cut in advance, and no token
is left out.

A sample holds `seq_length` tokens to read, and one token of look-ahead where it stops inside of a
document: the label of its last token. That document goes on from the look-ahead. So every token is
read once, and every token but a document's first is predicted once.

The buffer holds twice the size that a user gives. When so many documents have ended that no more
than that size are left, it is filled up: that begins the next round. Which document is picked is a
function of (seed, buffer, round, number of the pick in the round), so nothing has to be stored.
A run has a fixed number of such buffers. Sample n is number n // buffers of buffer n % buffers;
documents are dealt out in turn, in an order of (seed, epoch). Whichever rank or worker reads a
sample, it is the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.packing import Piece
from megatron_trinity.data.permutation import key_of, shuffled
from megatron_trinity.errors import UsageError

DEFAULT_SIZE = 1024
"""Documents of one buffer: the report's 4096 a GPU, dealt to its four workers."""

DEFAULT_BUFFERS = 4
"""Buffers of a run: the report's four workers, of one GPU. More GPUs have use for more."""

_PICKS = 1024  # random numbers drawn at a time


@dataclass(frozen=True)
class BufferState:
    """Where a buffer stands between two samples: small, and all that its future depends on."""

    samples: int  # read so far
    round: int
    picks: int  # made so far in the round
    epoch: int  # from which the next document is loaded
    loaded: int  # documents that the buffer was dealt in that epoch and has loaded
    documents: NDArray[np.int64]  # that are open, in the order of the picks, [open]
    heads: NDArray[np.int64]  # the next token to read of each, [open]


class DocumentBufferPacking:
    """Samples of one source through Random Sequential Document Buffers; a `Packing`.

    Reading onwards is quick. A sample further ahead replays those between, at hundreds of millions
    of tokens a second; one further back replays from the newest state that `restore` was given
    before it, or from the start.

    Memory: 12 bytes a document, and some 300 bytes for each that is open.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        seq_length: int,
        seed: int,
        *,
        size: int = DEFAULT_SIZE,
        buffers: int = DEFAULT_BUFFERS,
        epochs: int | None = None,
    ) -> None:
        """Args:
        lengths: tokens of each document, `[d]`; 0 is allowed, but not for all.
        size: documents of one buffer. It holds up to twice as many, and never more than it is
            dealt in an epoch.
        buffers: how many there are, for the whole run.
        epochs: how often each document is read, after which the samples end; None for no end.

        Raises:
            UsageError: there are fewer documents than buffers, or a number is below 1.
        """
        if size < 1 or buffers < 1:
            raise UsageError(f"{buffers} document buffers of {size} documents: give at least 1")
        self._deal = _Deal(lengths, seed, buffers, epochs)
        self._lengths, self._seq_length, self._buffers = lengths, seq_length, buffers
        self._epochs = epochs
        self._capacity = min(2 * size, max(self._deal.fewest, 2))
        self._key = (seed, buffers, self._capacity)
        self._running: dict[int, _Buffer] = {}
        self._restored: dict[int, BufferState] = {}

    def __len__(self) -> int:
        """Samples of all epochs; where they have no end, of one."""
        return int(self._samples_of_each.sum())

    def pieces(self, index: int) -> Sequence[Piece]:
        """The pieces of sample `index`.

        `seq_length + 1` tokens, or `seq_length` where a document ends with the sample: then no
        label follows. Fewer only in the last sample of a buffer.

        Raises:
            IndexError: the samples end before it.
        """
        buffer, number = self._locate(index)
        return [Piece(*piece) for piece in self._at(buffer, number).next_sample()]

    def state(self, buffer: int, samples: int) -> BufferState:
        """How `buffer` stands when it has read `samples` samples."""
        return self._at(buffer, samples).state()

    def restore(self, buffer: int, state: BufferState) -> None:
        """Let `buffer` go on from `state`, which `state()` of the same packing gave."""
        self._restored[buffer] = state

    def _at(self, buffer: int, samples: int) -> _Buffer:
        running = self._running.get(buffer)
        known = self._restored.get(buffer)
        if known is not None and known.samples > samples:
            known = None
        if running is None or not (known.samples if known else 0) <= running.samples <= samples:
            running = _Buffer(self._deal, buffer, self._seq_length, self._capacity, self._key)
            if known is not None:
                running.restore(known)
            self._running[buffer] = running
        while running.samples < samples:
            running.next_sample()
        return running

    def _locate(self, index: int) -> tuple[int, int]:
        """Buffer of sample `index`, and its number there. Buffers that have ended are left out."""
        if index < 0:
            raise IndexError(index)
        if self._epochs is None:
            return index % self._buffers, index // self._buffers
        counts = self._samples_of_each
        ends = np.sort(counts)
        # Samples of all buffers before the k-th to end has ended.
        before = np.cumsum(np.diff(ends, prepend=0) * np.arange(len(ends), 0, -1))
        ended = int(before.searchsorted(index, side="right"))
        if ended == len(ends):
            raise IndexError(index)
        first, row = (int(before[ended - 1]), int(ends[ended - 1])) if ended else (0, 0)
        more, place = divmod(index - first, len(ends) - ended)
        return int(np.flatnonzero(counts > row + more)[place]), row + more

    @cached_property
    def _samples_of_each(self) -> NDArray[np.int64]:
        """Samples of each buffer, `[buffers]`."""
        tokens = np.zeros(self._buffers, dtype=np.int64)
        for epoch in range(self._epochs or 1):
            for buffer in range(self._buffers):
                documents = self._deal.documents(buffer, epoch)
                tokens[buffer] += self._lengths[documents].sum(dtype=np.int64)
        return -(-tokens // self._seq_length)


class _Deal:
    """Which documents each buffer loads: those with a token, in turn, in an order of each epoch."""

    def __init__(
        self, lengths: NDArray[np.int32], seed: int, buffers: int, epochs: int | None
    ) -> None:
        self.lengths, self._seed, self._buffers, self._epochs = lengths, seed, buffers, epochs
        held = np.flatnonzero(lengths)
        self._held = held.astype(np.int32) if len(lengths) < 1 << 31 else held
        self.fewest = len(held) // buffers
        """Documents that a buffer is dealt in an epoch, or one less than it."""
        if not self.fewest:
            raise UsageError(
                f"{len(held)} documents with a token are too few for {buffers} document buffers: "
                "give fewer buffers"
            )
        self._order = lru_cache(maxsize=2)(self._make_order)

    def documents(self, buffer: int, epoch: int) -> NDArray[np.integer]:
        """All that `buffer` is dealt in `epoch`, in order; empty behind the last epoch."""
        if self._epochs is not None and epoch >= self._epochs:
            return self._held[:0]
        return self._order(epoch)[buffer :: self._buffers]

    def _make_order(self, epoch: int) -> NDArray[np.integer]:
        return self._held[shuffled(len(self._held), "document buffer", self._seed, epoch)]


class _Buffer:
    """One buffer, read from its start on, or from a state of it."""

    def __init__(
        self, deal: _Deal, buffer: int, seq_length: int, capacity: int, key: tuple[int, ...]
    ) -> None:
        self._deal, self._buffer, self._seq_length = deal, buffer, seq_length
        self._capacity, self._key = capacity, key
        self.samples = self._epoch = self._loaded = self._blocks = 0
        self._round = -1
        self._refill_at = capacity // 2  # open documents; -1 where there are none left to load
        self._open: list[tuple[int, int, int]] = []  # document, head, end
        self._picks: list[int] = []  # 32 random bits each, used from the end

    def next_sample(self) -> list[tuple[int, int, int]]:
        """Read a sample: document, first token and number of tokens of each piece.

        A turn of the loop reads a piece; a replay spends its time there.
        """
        opened, picks, room = self._open, self._picks, self._seq_length
        pieces = []
        while room:
            if len(opened) <= self._refill_at:
                self._refill()
            if not opened:
                break
            if not picks:
                self._draw()
            place = picks.pop() * len(opened) >> 32
            document, head, end = opened[place]
            left = end - head
            if left > room:  # the last token of the piece is the look-ahead
                pieces.append((document, head, room + 1))
                opened[place] = (document, head + room, end)
                room = 0
            else:
                pieces.append((document, head, left))
                room -= left
                last = opened.pop()
                if place < len(opened):
                    opened[place] = last
        self.samples += 1
        return pieces

    def state(self) -> BufferState:
        return BufferState(
            self.samples,
            self._round,
            self._blocks * _PICKS - len(self._picks),
            self._epoch,
            self._loaded,
            np.array([document for document, _, _ in self._open], dtype=np.int64),
            np.array([head for _, head, _ in self._open], dtype=np.int64),
        )

    def restore(self, state: BufferState) -> None:
        self.samples, self._round = state.samples, state.round
        self._epoch, self._loaded = state.epoch, state.loaded
        ends = self._deal.lengths[state.documents].tolist()
        opened = zip(state.documents.tolist(), state.heads.tolist(), ends, strict=True)
        self._open[:] = opened
        self._blocks, used = divmod(state.picks, _PICKS)
        self._picks.clear()
        if used:
            self._draw()
            del self._picks[_PICKS - used :]

    def _refill(self) -> None:
        """Load documents up to the capacity, or all that there are; that begins a round."""
        before = len(self._open)
        while (missing := self._capacity - len(self._open)) > 0:
            dealt = self._deal.documents(self._buffer, self._epoch)
            if not len(dealt):
                self._refill_at = -1
                break
            loaded = dealt[self._loaded : self._loaded + missing]
            lengths = self._deal.lengths[loaded].tolist()
            self._open += [(d, 0, n) for d, n in zip(loaded.tolist(), lengths, strict=True)]
            self._loaded += len(loaded)
            if self._loaded == len(dealt):
                self._epoch, self._loaded = self._epoch + 1, 0
        if len(self._open) > before:
            self._round += 1
            self._blocks = 0
            self._picks.clear()

    def _draw(self) -> None:
        key = int.from_bytes(key_of(*self._key, self._buffer, self._round)[:16], "little")
        numbers = np.random.Philox(key=key, counter=self._blocks * _PICKS // 4).random_raw(_PICKS)
        self._picks += (numbers >> np.uint64(32)).tolist()
        self._picks.reverse()  # popped from the end, so in the order drawn
        self._blocks += 1
