"""What stands in `events.jsonl`: a line an event, each a JSON object with `kind` and `time`."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = 1
"""Version, in every `start`: it grows when a field goes or changes its meaning."""

NAME = "events.jsonl"


@dataclass(frozen=True)
class Kind:
    """One kind of event: when it is written, and its fields beside `kind` and `time`."""

    when: str
    fields: dict[str, str]


KINDS: dict[str, Kind] = {
    "start": Kind(
        "when the first step of a process begins",
        {
            "schema": "version of this table",
            "iteration": "that it goes on behind; what an earlier process did beyond it is lost",
            "launched": "when the process began; seconds since 1970",
            "world_size": "ranks",
            "host": "name of the machine of the rank that writes",
            "command": "words of the command line",
            "arguments": "all flags, as in `arguments.yaml`",
            "versions": "package to version",
            "git": "commit of the project, and whether its files differ from it; null without git",
            "parameters": "of the whole model, and those that a token meets",
            "planned_peak": "bytes at once that the planner expects of the last rank; null on CPUs",
            "layers": "numbers of the MoE layers, from 1, in the order of all lists by layer",
            "train_iters": "steps of the whole run",
            "tokens_per_sample": "length of a sequence",
        },
    ),
    "step": Kind(
        "behind each step",
        {
            "iteration": "number of the step, from 1",
            "seconds": "from the end of the step before, without saves and evaluations",
            "samples": "that the run has taken so far",
            "tokens": "of this step",
            "applied": "false where the weights stay as they were",
            "values": "what TensorBoard has of the step, by the same names",
            "max violation": "MaxVio of each MoE layer; not of a step that is left out",
        },
    ),
    "loads": Kind(
        "about a hundred times in a run, behind a step",
        {
            "iteration": "number of the step",
            "counts": "tokens of the global batch by MoE layer and expert",
            "bias": "of each expert, by MoE layer, behind the step",
        },
    ),
    "data": Kind(
        "with each line of the log",
        {
            "iteration": "number of the step",
            "sources": "what each source has given so far: tokens, documents, epochs",
        },
    ),
    "evaluation": Kind(
        "behind the evaluation of one set",
        {
            "iteration": "behind which it is",
            "set": "its name; empty where there is one",
            "of_test": "whether it is of the test data",
            "seconds": "that it took",
            "values": "losses, perplexity, bits per byte",
        },
    ),
    "save": Kind(
        "when the trainer goes on behind a save",
        {
            "iteration": "that is saved",
            "seconds": "that training stood still",
            "background": "whether files were still being written then (`--async-save`)",
        },
    ),
    "ranks": Kind(
        "behind every step whose number `--straggler-interval` divides",
        {
            "iteration": "number of the step",
            "slowest": "the rank whose own time is longest, compared with its pipeline stage's",
            "host": "name of its machine",
            "ratio": "its time to the median of its stage",
            "parts": "the same by part of a step",
            "seconds": "own time of a step, by rank",
        },
    ),
    "alarm": Kind(
        "with each warning about the run",
        {
            "iteration": "of the step; null outside of steps",
            "what": "`climb`, `spike`, `not finite`, `signal`, `hang`, `rank lost`, or another",
            "line": "as it is printed",
        },
    ),
    "end": Kind(
        "when a process ends in order, or says why it does not",
        {
            "iteration": "of the last step",
            "code": "the exit code",
            "line": "why; empty at the end of training",
        },
    ),
    "gap": Kind(
        "when the file can be written again after it could not",
        {"events": "how many are missing"},
    ),
}
"""Kind to what it is."""
