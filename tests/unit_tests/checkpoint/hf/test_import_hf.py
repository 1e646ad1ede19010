"""From Hugging Face into a checkpoint and back: the same bits, the same model, in every layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AfmoeForCausalLM

from megatron_trinity.checkpoint.hf.config import flags_from_hf_config
from megatron_trinity.checkpoint.hf.mapping import Experts
from tests.afmoe import random_tensors, to_trinity, write_afmoe
from tests.checkpoints import check_whole
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse
from tests.unit_tests.checkpoint.hf.test_export_hf import write_tokenizer
from tests.unit_tests.model.test_hf_parity import CASES, tokens

BIAS = "model.layers.1.mlp.expert_bias"
LITTLE = 40_000
"""Bytes of memory with which every tensor of the small model is cut."""


def convert(
    rank: int, world_size: int, hf: Path, save: Path, back: Path | None, options: dict[str, Any]
) -> tuple[dict[str, int], str]:
    """Import, and export again if asked; returns what is not finite, or the error."""
    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.checkpoint.hf.import_hf import import_hf
    from megatron_trinity.errors import TrinityError

    exporting = options.pop("exporting", {})
    try:
        done = import_hf(hf, save, **options)
        if back is not None:
            export_hf(save, back, **exporting)
    except TrinityError as error:
        return {}, str(error)
    return done.nonfinite, ""


def converted(ranks: RankPools, hf: Path, save: Path, back: Path, **options: Any) -> None:
    [(nonfinite, error)] = ranks.run(convert, hf, save, back, options, world_size=1)
    assert (nonfinite, error) == ({}, "")


def weights(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8))
        for name, tensor in one.items()
    )


def logits_of_import(
    rank: int, world_size: int, save: Path, overrides: dict[str, Any], ids: Tensor
) -> Tensor:
    """Of our model, with the imported checkpoint read by Megatron's own loader."""
    from megatron.core import dist_checkpointing

    model = build(parse(afmoe_config(**overrides)))
    state = model.sharded_state_dict()
    loaded = dist_checkpointing.load(state, str(save / "release"))  # with arguments and the like
    model.load_state_dict({key: loaded[key] for key in state}, strict=False)
    with torch.no_grad():
        out: Tensor = model.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    return out


@pytest.mark.parametrize("dtype", first(1, [torch.bfloat16, torch.float32]), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_bit_by_bit(
    ranks: RankPools, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    length, overrides = CASES[case]
    config = afmoe_config(**overrides)
    number = list(CASES).index(case)
    experts: Experts = "fused" if number % 2 else "per-expert"
    tensors = random_tensors(config, dtype, experts)
    hf = write_afmoe(tmp_path / "hf", config, tensors, files=1 + number % 3)
    options = {"exporting": {"experts": experts}}
    converted(ranks, hf, tmp_path / "save", tmp_path / "back", **options)
    assert same_bits(weights(tmp_path / "back"), tensors)
    if dtype == torch.float32:
        ids = tokens(config, length)
        with torch.no_grad():
            first, second = (
                AfmoeForCausalLM.from_pretrained(path, attn_implementation="eager")(ids).logits
                for path in (hf, tmp_path / "back")
            )
        # The bits of the weights are the same; where they lie in memory moves sums by rounding.
        torch.testing.assert_close(second, first, rtol=0, atol=2e-6)
        [ours] = ranks.run(logits_of_import, tmp_path / "save", overrides, ids, world_size=1)
        torch.testing.assert_close(ours[..., : config.vocab_size], first, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_little_memory_and_several_files_change_nothing(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config(vocab_size=300)
    tensors = random_tensors(config, torch.bfloat16, "fused")
    hf = write_afmoe(tmp_path / "hf", config, tensors, files=3)
    back = {"memory_bytes": LITTLE, "shard_bytes": 200_000, "workers": 2}
    options = {"memory_bytes": LITTLE, "workers": 2, "exporting": back}
    converted(ranks, hf, tmp_path / "save", tmp_path / "back", **options)
    assert len(list((tmp_path / "save/release").glob("*.distcp"))) > 40
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    per_expert = random_tensors(config, torch.bfloat16)
    found = weights(tmp_path / "back")
    assert found.keys() == per_expert.keys()
    assert same_bits(to_trinity(found, config), to_trinity(tensors, config))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "save"]
    assert sorted(path.name for path in (tmp_path / "save").iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]
    check_whole(tmp_path / "save" / "release", checksums=True)


def test_what_transformers_saves_is_imported(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config()
    write_afmoe(tmp_path / "hf", config, random_tensors(config, torch.float32))
    model = AfmoeForCausalLM.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    converted(ranks, tmp_path / "saved", tmp_path / "save", tmp_path / "back")
    assert same_bits(weights(tmp_path / "back"), weights(tmp_path / "hf"))


def stored(rank: int, world_size: int, save: Path) -> tuple[dict[str, Tensor], Any]:
    from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(save)
    return {key: checkpoint.tensor(key) for key in checkpoint.model_keys()}, checkpoint.args


def test_vectors_become_fp32_and_the_vocabulary_is_padded(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config(vocab_size=150)
    tensors = {n: t.bfloat16() for n, t in random_tensors(config, torch.bfloat16).items()}
    hf = write_afmoe(tmp_path / "hf", config, tensors)
    converted(ranks, hf, tmp_path / "save", tmp_path / "back")
    [(found, args)] = ranks.run(stored, tmp_path / "save", world_size=1)
    expected = to_trinity(tensors, config)
    assert args.padded_vocab_size == 256
    for key, tensor in found.items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 1 else torch.bfloat16), key
        if len(expected[key]) == 150:
            assert torch.equal(tensor[150:], torch.zeros(106, 64).bfloat16())
            tensor = tensor[:150]
        assert torch.equal(tensor.float(), expected[key].float()), key
    assert weights(tmp_path / "back")["lm_head.weight"].shape == (150, 64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_dtype_on_request(ranks: RankPools, tmp_path: Path, dtype: str) -> None:
    config = afmoe_config()
    tensors = random_tensors(config, torch.float32)
    hf = write_afmoe(tmp_path / "hf", config, tensors)
    converted(ranks, hf, tmp_path / "save", tmp_path / "back", dtype=dtype)
    kept = torch.bfloat16 if dtype == "bf16" else torch.float32
    expected = {n: t if t.ndim == 1 else t.to(kept) for n, t in tensors.items()}
    assert same_bits(weights(tmp_path / "back"), expected)


def test_values_that_are_not_finite_are_counted(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config()
    tensors = random_tensors(config, torch.float32)
    tensors[BIAS][2:4] = torch.tensor([torch.nan, -torch.inf])
    hf = write_afmoe(tmp_path / "hf", config, tensors)
    [refused] = ranks.run(convert, hf, tmp_path / "save", None, {}, world_size=1)
    assert refused == ({}, f"{BIAS} has 2 values that are not finite")
    assert not (tmp_path / "save").exists()
    options = {"allow_nonfinite": True, "exporting": {"allow_nonfinite": True}}
    [taken] = ranks.run(convert, hf, tmp_path / "save", tmp_path / "back", options, world_size=1)
    assert taken == ({BIAS: 2}, "")
    assert same_bits(weights(tmp_path / "back"), tensors)


def test_what_is_there_is_kept_unless_told_otherwise(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config()
    first = random_tensors(config, torch.float32)
    second = {name: tensor + 1 for name, tensor in first.items()}
    write_afmoe(tmp_path / "first", config, first)
    write_afmoe(tmp_path / "second", config, second)
    save = tmp_path / "save"
    converted(ranks, tmp_path / "first", save, tmp_path / "back")
    [refused] = ranks.run(convert, tmp_path / "second", save, None, {}, world_size=1)
    assert "--overwrite" in refused[1]
    converted(ranks, tmp_path / "second", save, tmp_path / "again", overwrite=True)
    assert same_bits(weights(tmp_path / "back"), first)
    assert same_bits(weights(tmp_path / "again"), second)


def test_a_path_that_cannot_be_written(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config()
    hf = write_afmoe(tmp_path / "hf", config, random_tensors(config, torch.float32))
    (tmp_path / "file").write_text("here")
    save = tmp_path / "file/save"
    [(_, error)] = ranks.run(convert, hf, save, None, {}, world_size=1)
    assert error == f"cannot write into {save}: Not a directory"
    assert (tmp_path / "file").read_text() == "here"


def test_tokenizer_template_and_generation_come_along(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config()
    hf = write_afmoe(tmp_path / "hf", config, random_tensors(config, torch.float32))
    write_tokenizer(hf)
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "generation_config.json").write_text('{"eos_token_id": [1, 3], "temperature": 0.5}')
    converted(ranks, hf, tmp_path / "save", tmp_path / "back")
    [(_, args)] = ranks.run(stored, tmp_path / "save", world_size=1)
    assert args.tokenizer_model == str(tmp_path / "save/tokenizer")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        for place in ("save/tokenizer", "back"):
            assert (tmp_path / place / name).read_bytes() == (hf / name).read_bytes(), name


def interrupted(rank: int, world_size: int, hf: Path, save: Path) -> tuple[int, int, int]:
    """Files of tensors written before an interruption, written after it, and there in the end."""
    from megatron_trinity.checkpoint.hf import import_files, import_hf

    write_file, written = import_files.write_file, 0

    def counting(*args: Any) -> Any:
        nonlocal written
        if written == 3:
            raise KeyboardInterrupt
        written += 1
        return write_file(*args)

    setattr(import_files, "write_file", counting)
    try:
        with pytest.raises(KeyboardInterrupt):
            import_hf.import_hf(hf, save, memory_bytes=LITTLE)
        assert not (save / "latest_checkpointed_iteration.txt").exists()
        written = -(10**6)
        import_hf.import_hf(hf, save, memory_bytes=LITTLE)
    finally:
        setattr(import_files, "write_file", write_file)
    files = len(list((save / "release").glob("*.distcp")))
    return 3, written + 10**6, files - 1  # the last one has no tensors


def test_an_interrupted_import_goes_on(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config()
    tensors = random_tensors(config, torch.float32)
    hf = write_afmoe(tmp_path / "hf", config, tensors)
    [(before, after, files)] = ranks.run(interrupted, hf, tmp_path / "save", world_size=1)
    assert before + after == files
    [(found, _)] = ranks.run(stored, tmp_path / "save", world_size=1)
    expected = to_trinity(tensors, config)
    assert all(torch.equal(found[key][: len(whole)], whole) for key, whole in expected.items())


LAYOUTS: dict[str, tuple[str, ...]] = {
    "data parallel": (),
    "tensor parallel": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "pipeline parallel": ("--pipeline-model-parallel-size", "2"),
    "expert parallel": ("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
    "bf16": ("--bf16", "--expert-model-parallel-size", "2"),
}
OVERRIDES = {"num_hidden_layers": 4, "vocab_size": 300}  # padded to 384, or on two ranks to 512


def train(rank: int, world_size: int, load: Path, save: Path, flags: tuple[str, ...]) -> None:
    """A step of the trainer itself that changes nothing."""
    from megatron_trinity.training.pretrain import pretrain

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    pretrain(
        [
            *flags_from_hf_config(afmoe_config(**OVERRIDES)),
            *("--micro-batch-size", "1", "--global-batch-size", "2", "--seq-length", "16"),
            *("--train-iters", "1", "--lr", "0", "--lr-decay-style", "constant"),
            *("--eval-iters", "0", "--eval-interval", "2", "--optimizer", "adam"),
            *("--mock-data", "--num-workers", "0", "--tokenizer-type", "NullTokenizer"),
            *("--load-balancing", "none", "--load", str(load), "--save", str(save)),
            *("--save-interval", "1", *flags),
        ]
    )


def export(rank: int, world_size: int, load: Path, hf: Path, options: dict[str, Any]) -> None:
    from megatron_trinity.checkpoint.hf.export_hf import export_hf

    export_hf(load, hf, **options)


@pytest.mark.parametrize("layout", first(3, LAYOUTS))
def test_the_trainer_starts_from_it_in_every_layout(
    ranks: RankPools, tmp_path: Path, layout: str
) -> None:
    config = afmoe_config(**OVERRIDES)
    flags = LAYOUTS[layout]
    dtype = torch.bfloat16 if "--bf16" in flags else torch.float32
    tensors = random_tensors(config, dtype)
    hf = write_afmoe(tmp_path / "hf", config, tensors)
    converted(ranks, hf, tmp_path / "save", tmp_path / "back")
    # Without --finetune as well: Megatron looks for no optimizer beside weights of no run.
    finetune = () if layout == "data parallel" else ("--finetune",)
    trained = tmp_path / "trained"
    ranks.run(train, tmp_path / "save", trained, (*flags, *finetune), world_size=2)
    assert (trained / "latest_checkpointed_iteration.txt").read_text() == "1"
    # In slices, across what the ranks wrote.
    options = {"memory_bytes": LITTLE}
    ranks.run(export, trained, tmp_path / "again", options, world_size=1)
    assert same_bits(weights(tmp_path / "again"), tensors)
