"""The names of what is logged, the same in TensorBoard, in W&B and in the `values` of an event."""

from __future__ import annotations

from dataclasses import dataclass

SPEED, MEMORY = "tokens per second", "peak memory (GiB)"
THROUGHPUT = "throughput per GPU (TFLOP/s/GPU)"


@dataclass(frozen=True)
class Name:
    """One name, or several that end alike.

    Attributes:
        name: `{...}` stands for what there is more than one of.
        meaning: with its unit.
        places: where it is: T(ensorBoard), W(&B), E(vents).
    """

    name: str
    meaning: str
    places: str = "TWE"


NAMES: tuple[Name, ...] = (
    Name("lm loss", "cross entropy, mean over the tokens that carry loss; nats"),
    Name("z loss", "what the z-loss adds to it"),
    Name("sequence loss", "what the sequence-wise auxiliary loss adds"),
    Name("learning-rate", "of Muon, or of the only optimizer"),
    Name("adamw learning rate", "of AdamW beside Muon"),
    Name("grad-norm", "of all gradients before clipping"),
    Name("loss-scale", "1 without --fp16"),
    Name("params-norm", "of all weights, with --log-params-norm"),
    Name("num-zeros", "zeros among the gradients, with --log-num-zeros-in-grad"),
    Name(SPEED, "over all ranks"),
    Name(
        THROUGHPUT,
        "of a GPU or process; in TensorBoard and W&B with --log-throughput",
    ),
    Name(MEMORY, "of the last rank; on a CPU that of the process"),
    Name("max violation", "MaxVio of the worst layer: (most tokens of an expert - mean) / mean"),
    Name("min violation", "the same of the least tokens"),
    Name("mean violation", "mean distance from the mean, over layers"),
    Name("load entropy", "of the share of the experts, mean over layers; nats"),
    Name("unused experts", "without a token, over all layers"),
    Name("max expert bias", "largest magnitude"),
    Name("{load metric}/layer {NN}", "the six above, of one layer", "TW"),
    Name("max logit", "of the LM head over the tokens of the step"),
    Name("mean logit", "likewise"),
    Name("batch heterogeneity", "largest loss of a micro-batch less their mean (BatchHet)"),
    Name("lm loss validation{-set}", "of an evaluation; nats a token"),
    Name("perplexity validation{-set}", "its exponential"),
    Name("bits per byte validation{-set}", "where a manifest counts the bytes"),
    Name("data {tokens, documents, epochs} {source}", "what a source has given so far"),
    Name("batch-size", "sequences of the step", "TW"),
    Name("samples vs steps", "sequences so far", "W"),
    Name("skipped-train-samples", "of --iterations-to-skip", "TW"),
    Name("iteration-time", "seconds, mean since the line before", "TW"),
    Name("world-size", "with --log-world-size-to-tensorboard", "TW"),
    Name("mem-{...}", "of torch's allocator, bytes", "T"),
    Name("{any of a step} vs samples", "the same over sequences in place of steps", "T"),
)


def table() -> str:
    """All of them, as Markdown."""
    rows = [
        f"| `{one.name}` | {one.meaning} | "
        + " | ".join("yes" if place in one.places else "" for place in "TWE")
        + " |"
        for one in NAMES
    ]
    head = ["| name | what | TensorBoard | W&B | events |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])
