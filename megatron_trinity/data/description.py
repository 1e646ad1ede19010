"""What a run reads, described: sources, phases with their blends, sets to evaluate on.

sources:
  web: {path: data/web_train}
  code: {path: [data/code_a_train, data/code_b_train], epochs: 4}
phases:
  - {tokens: 13T, blend: {web: 0.8, code: 0.2}}
  - {blend: {web: 0.5, code: 0.5}}
validation:
  web: {path: data/web_valid, samples: 1024}
  code: {path: data/code_valid}
test: {path: data/web_test}
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_trinity.data.blend import SMALLEST_SHARE
from megatron_trinity.data.corpus import Part
from megatron_trinity.data.length_bias import LengthBias
from megatron_trinity.data.packings import PACKINGS
from megatron_trinity.errors import UsageError
from megatron_trinity.yaml_loader import LOADER

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Source:
    """Documents under a name.

    `epochs`: how often the run may read them; None for as often as it takes. `length_bias`: which
    of them, by their lengths; None for all.
    """

    name: str
    parts: tuple[Part, ...]
    epochs: float | None = None
    length_bias: LengthBias | None = None


@dataclass(frozen=True)
class PlannedPhase:
    """A stretch of the run.

    Attributes:
        tokens: how long it is; None for the last one, which lasts as long as the run.
        weights: name of a source to its weight; None for weights by tokens, of all sources.
        packing: a name of `PACKINGS`.
        options: of the packing.
    """

    tokens: int | None = None
    weights: Mapping[str, float] | None = None
    packing: str = "sequential"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSet:
    """What a loss is measured on.

    Attributes:
        name: in the log; empty where there is one set, from Megatron's flags.
        sources: read one behind the other, or blended where there are weights.
        weights: of `sources`.
        samples: how many of the first ones; None for one pass over all, or what `--eval-iters`
            leaves of it.
    """

    name: str
    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Description:
    """All that a run reads."""

    sources: tuple[Source, ...] = ()
    phases: tuple[PlannedPhase, ...] = ()
    validation: tuple[EvaluationSet, ...] = ()
    test: tuple[EvaluationSet, ...] = ()

    def parts(self) -> list[Part]:
        """Every share of a dataset that is named, once."""
        evaluated = [source for one in (*self.validation, *self.test) for source in one.sources]
        parts = [part for source in (*self.sources, *evaluated) for part in source.parts]
        return list(dict.fromkeys(parts))


def read_description(path: str | Path) -> Description:
    """The description in a YAML file; relative paths in it are relative to where the run starts.

    Raises:
        UsageError: it cannot be read, or something in it is unknown or makes no sense; in one line.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--data {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _description(content)
    except UsageError as error:
        raise UsageError(f"--data {path}: {error}") from error


class _Loader(LOADER):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for node_of_key, _ in node.value:
            key = self.construct_object(node_of_key, deep=True)
            if isinstance(key, Hashable):  # YAML refuses others
                if key in keys:
                    raise yaml.YAMLError(f"{key} stands twice")
                keys.add(key)
        return super().construct_mapping(node, deep)


def _description(content: Any) -> Description:
    top = _block(content, "the file", ("sources", "phases", "validation", "test"))
    sources = tuple(
        _source(str(name), entry) for name, entry in _block(top.get("sources"), "sources").items()
    )
    if not sources and not top.get("validation"):
        raise UsageError("sources: there are none; name one at least")
    entries = top.get("phases", [{}] if sources else [])
    if not isinstance(entries, list) or (sources and not entries):
        raise UsageError("phases: give a list of one or more")
    names = [source.name for source in sources]
    phases = tuple(_phase(number, entry, names) for number, entry in enumerate(entries, 1))
    for number, phase in enumerate(phases[:-1], 1):
        if phase.tokens is None:
            raise UsageError(f"phase {number} has no tokens; only the last one may leave them out")
    _check_packings(phases, names)
    validation = tuple(
        _evaluation_set(str(name), entry)
        for name, entry in _block(top.get("validation", {}), "validation").items()
    )
    test = (_evaluation_set("test", top["test"]),) if "test" in top else ()
    return Description(sources, phases, validation, test)


def _source(name: str, entry: Any) -> Source:
    where = f"source {name}"
    block = _block(entry, where, ("path", "epochs", "length_bias"))
    epochs = block.get("epochs")
    if epochs is not None:
        epochs = number_in(epochs, f"{where}: epochs")
    return Source(name, _parts(block, where), epochs, _length_bias(block, where))


def _length_bias(block: Mapping[str, Any], where: str) -> LengthBias | None:
    """`length_bias: {}` is the report's."""
    if "length_bias" not in block:
        return None
    where = f"{where}: length_bias"
    given = _block(block["length_bias"], where, ("floor", "ceiling", "full_at"))
    values = {key: number_in(value, f"{where}: {key}") for key, value in given.items()}
    bias = LengthBias(
        values.get("floor", LengthBias.floor),
        values.get("ceiling", LengthBias.ceiling),
        math.ceil(values.get("full_at", LengthBias.full_at)),
    )
    if not bias.floor <= bias.ceiling <= 1:
        raise UsageError(f"{where}: floor has to be at most ceiling, and ceiling at most 1")
    return bias


def _evaluation_set(name: str, entry: Any) -> EvaluationSet:
    where = f"validation {name}"
    block = _block(entry, where, ("path", "samples"))
    samples = block.get("samples")
    if samples is not None:
        samples = math.ceil(number_in(samples, f"{where}: samples"))
    return EvaluationSet(name, (Source(name, _parts(block, where)),), samples=samples)


def _parts(block: Mapping[str, Any], where: str) -> tuple[Part, ...]:
    paths = block.get("path")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise UsageError(f"{where}: path has to be the prefix of a dataset, or a list of them")
    return tuple(Part(path) for path in paths)


def _phase(number: int, entry: Any, names: Sequence[str]) -> PlannedPhase:
    where = f"phase {number}"
    if isinstance(entry, dict) and {"sequence_length", "seq_length"} & set(entry):
        raise UsageError(
            f"{where}: the length of sequences cannot change within a run; start the phase as a "
            "run of its own, with --seq-length and --extend-context"
        )
    block = _block(entry, where, ("tokens", "blend", "packing"))
    tokens, blend = block.get("tokens"), block.get("blend")
    if isinstance(tokens, dict):
        if blend is not None:
            raise UsageError(f"{where}: tokens of each source are a blend already; leave out blend")
        blend = {name: number_in(value, f"{where}: {name}") for name, value in tokens.items()}
        tokens = sum(blend.values())
    if tokens is not None:
        tokens = math.ceil(number_in(tokens, f"{where}: tokens"))
    packing, options = _packing(block.get("packing", "sequential"), where)
    weights = None if blend is None else _weights(blend, where, names)
    return PlannedPhase(tokens, weights, packing, options)


def _packing(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    options = dict(entry) if isinstance(entry, dict) else {"kind": entry}
    kind = options.pop("kind", None)
    if kind not in PACKINGS:
        raise UsageError(f"{where}: packing {kind} is none of {', '.join(PACKINGS)}")
    for option in options:
        if option not in PACKINGS[kind].options:
            raise UsageError(f"{where}: packing {kind} has no {option}")
        if number_in(options[option], f"{where}: {option}") % 1:
            raise UsageError(f"{where}: {option} is {options[option]}; give a whole number")
        options[option] = int(number_in(options[option], option))
    return kind, options


def _weights(blend: Any, where: str, names: Sequence[str]) -> dict[str, float]:
    weights = {}
    for name, value in _block(blend, f"{where}: blend").items():
        if name not in names:
            raise UsageError(f"{where}: {name} is none of the sources: {', '.join(names[:8])}")
        weights[str(name)] = number_in(value, f"{where}: the weight of {name}")
    if not weights:
        raise UsageError(f"{where}: blend names no source")
    check_shares(weights)
    return weights


def check_shares(weights: Mapping[str, float]) -> None:
    """Refuse a source that would never be drawn.

    Raises:
        UsageError: its weight is not above 0, or next to nothing beside the others.
    """
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UsageError(
                f"{name} has a weight of {weight:g} in its blend; give one above 0, or leave "
                "the dataset out"
            )
    total = sum(weights.values())
    for name, weight in weights.items():
        if weight / total < SMALLEST_SHARE:
            raise UsageError(
                f"{name} has {weight / total:g} of its blend, which no run would ever draw; "
                "leave it out"
            )


def _check_packings(phases: Sequence[PlannedPhase], names: Sequence[str]) -> None:
    """Where one packing ends in a source, another one cannot go on."""
    of_source: dict[str, tuple[str, Any]] = {}
    for phase in phases:
        packing = (phase.packing, phase.options)
        for name in phase.weights or names:
            if of_source.setdefault(name, packing) != packing:
                raise UsageError(
                    f"source {name} has two packings, and one cannot go on where the other "
                    "stops; give the phases sources of different names"
                )


def _block(value: Any, where: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UsageError(f"{where} has to be a block of keys and values, not {value!r}")
    for key in value:
        if keys is not None and key not in keys:
            raise UsageError(f"{where} has an unknown key {key}; it has {', '.join(keys)}")
    return value


def number_in(value: Any, where: str) -> float:
    """A number of a file, above 0: `3`, `0.5`, `1e12`, `500B`, `13T`.

    Raises:
        UsageError: it is none.
    """
    text = str(value).strip()
    scale = _SUFFIXES.get(text[-1:], 1)
    try:
        number = float(text[:-1] if scale > 1 else text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise UsageError(f"{where} is {value!r}; give a number above 0, such as 0.5, 500B or 13T")
    return number * scale
