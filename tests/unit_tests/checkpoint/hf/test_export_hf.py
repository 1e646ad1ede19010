"""A checkpoint that the trainer wrote, exported, is the same model to transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AfmoeForCausalLM

from megatron_trinity.checkpoint.hf.config import flags_from_hf_config
from megatron_trinity.checkpoint.hf.mapping import entries
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

LENGTH = 23
OVERRIDES = {"num_hidden_layers": 4, "vocab_size": 150}  # padded to 256 by Megatron


def train(rank: int, world_size: int, save: Path, flags: tuple[str, ...]) -> None:
    """Two steps of the trainer itself, on random tokens."""
    from megatron_trinity.training.pretrain import pretrain

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    pretrain(
        [
            *flags_from_hf_config(afmoe_config(**OVERRIDES)),
            *("--micro-batch-size", "1", "--global-batch-size", "2", "--seq-length", "16"),
            *("--train-iters", "2", "--lr", "1e-2", "--lr-decay-style", "constant"),
            *("--eval-iters", "0", "--eval-interval", "2", "--optimizer", "adam"),
            *("--mock-data", "--num-workers", "0", "--tokenizer-type", "NullTokenizer"),
            *("--save", str(save), "--save-interval", "2"),
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def checkpoint(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "checkpoints"
    ranks.run(train, path, ("--expert-model-parallel-size", "2"), world_size=2)
    return path


@pytest.fixture(scope="module")
def bf16_checkpoint(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bf16") / "checkpoints"
    flags = ("--bf16", "--pipeline-model-parallel-size", "2", "--seed", "5")
    ranks.run(train, path, flags, world_size=2)
    return path


def export(
    rank: int, world_size: int, load: Path, hf: Path, options: dict[str, Any]
) -> int | tuple[str, str]:
    """Bytes written, or class and message of the error."""
    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.errors import TrinityError

    try:
        return export_hf(load, hf, **options).written
    except TrinityError as error:
        return type(error).__name__, str(error)


def exported(ranks: RankPools, load: Path, hf: Path, **options: Any) -> int:
    [written] = ranks.run(export, load, hf, options, world_size=1)
    assert isinstance(written, int), written
    return written


def refusal(ranks: RankPools, load: Path, hf: Path, **options: Any) -> str:
    [result] = ranks.run(export, load, hf, options, world_size=1)
    assert isinstance(result, tuple), "it was exported"
    assert result[0] == "TrinityError"
    assert "\n" not in result[1]
    return result[1]


def model_by_megatron(load: Path, flags: tuple[str, ...] = ()) -> Any:
    """Our model, with the weights of a checkpoint read by Megatron's own loader."""
    from megatron.core import dist_checkpointing

    args = parse(afmoe_config(**OVERRIDES), flags)
    args.padded_vocab_size = 256
    model = build(args)
    sharded = model.sharded_state_dict()
    state = dist_checkpointing.load(dict(sharded), str(load / "iter_0000002"))
    model.load_state_dict({name: state[name] for name in sharded if name in state})
    return model


def logits_of_ours(
    rank: int, world_size: int, load: Path, flags: tuple[str, ...], ids: Tensor
) -> Tensor:
    from megatron.core.transformer.module import Float16Module

    model = model_by_megatron(load, flags)
    wrapped = Float16Module(model.config, model) if flags else model
    with torch.no_grad():
        out: Tensor = wrapped.eval()(ids, torch.arange(LENGTH).expand_as(ids), None)
    return out[..., :150]


def ids() -> Tensor:
    return torch.randint(150, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def load_hf(path: Path) -> Any:
    model, report = AfmoeForCausalLM.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in report if kind.endswith("keys"))
    return model.eval()


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_transformers_computes_the_same_logits(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    exported(ranks, checkpoint, tmp_path / "hf")
    model = load_hf(tmp_path / "hf")
    assert model.dtype == torch.float32
    [ours] = ranks.run(logits_of_ours, checkpoint, (), ids(), world_size=1)
    with torch.no_grad():
        theirs = model(ids()).logits
    assert theirs.shape == ours.shape
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_a_bf16_run_is_exported_in_bf16_with_fp32_vectors(
    ranks: RankPools, bf16_checkpoint: Path, tmp_path: Path
) -> None:
    exported(ranks, bf16_checkpoint, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 1 else torch.bfloat16), name
    gains = torch.cat([t for name, t in tensors.items() if "norm" in name])
    assert not torch.equal(gains, gains.bfloat16().float()), "gains have their fp32 digits"
    model = load_hf(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    [ours] = ranks.run(logits_of_ours, bf16_checkpoint, ("--bf16",), ids(), world_size=1)
    with torch.no_grad():
        theirs = model(ids()).logits
    # A near tie between two experts may go either way for a token.
    close = (theirs.float() - ours.float()).abs().amax(dim=-1) <= 2e-2
    assert close.float().mean() >= 0.9


def test_one_format_and_the_true_vocabulary(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    written = exported(ranks, checkpoint, tmp_path / "hf")
    assert files(tmp_path) == ["hf"]
    assert files(tmp_path / "hf") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    tensors = load_file(tmp_path / "hf/model.safetensors")
    names = [name for entry in entries(afmoe_config(**OVERRIDES)) for name in entry.hf]
    assert sorted(tensors) == sorted(names)
    assert written == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors["lm_head.weight"].shape == (150, 64)
    assert tensors["model.embed_tokens.weight"].shape == (150, 64)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vocab_size"] == 150
    assert config["dtype"] == "float32"
    assert config["score_func"] == "sigmoid"
    assert config["sliding_window"] == 7


def test_shards_have_an_index(ranks: RankPools, checkpoint: Path, tmp_path: Path) -> None:
    limit = 100_000
    whole = exported(ranks, checkpoint, tmp_path / "one")
    written = exported(ranks, checkpoint, tmp_path / "many", shard_bytes=limit)
    assert written == whole
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > whole // limit
    assert shards == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    assert files(tmp_path / "many") == sorted(
        [*shards, "config.json", "generation_config.json", "model.safetensors.index.json"]
    )
    one = load_file(tmp_path / "one/model.safetensors")
    many: dict[str, Tensor] = {}
    for shard in shards:
        tensors = load_file(tmp_path / "many" / shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
        assert not many.keys() & tensors.keys()
        many |= tensors
    assert many.keys() == one.keys() == index["weight_map"].keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    with torch.no_grad():
        pair = [load_hf(tmp_path / name)(ids()).logits for name in ("one", "many")]
    assert torch.equal(*pair)


def test_another_dtype_on_request(ranks: RankPools, checkpoint: Path, tmp_path: Path) -> None:
    exported(ranks, checkpoint, tmp_path / "fp32")
    exported(ranks, checkpoint, tmp_path / "bf16", dtype="bf16")
    exact = load_file(tmp_path / "fp32/model.safetensors")
    rounded = load_file(tmp_path / "bf16/model.safetensors")
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32
        expected = tensor if tensor.ndim == 1 else tensor.bfloat16()
        assert rounded[name].dtype == expected.dtype, name
        assert torch.equal(rounded[name], expected), name
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_there_is_kept_unless_told_otherwise(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "mine.txt").write_text("keep")
    message = refusal(ranks, checkpoint, hf)
    assert str(hf) in message
    assert "--overwrite" in message
    assert files(hf) == ["mine.txt"]
    exported(ranks, checkpoint, hf, overwrite=True)
    assert "mine.txt" not in files(hf)
    assert "model.safetensors" in files(hf)
    assert files(tmp_path) == ["hf"]


def poison(rank: int, world_size: int, load: Path, key: str) -> None:
    """Rewrite a checkpoint with two values of a tensor not finite."""
    from megatron.core import dist_checkpointing

    iteration = load / "iter_0000002"
    model = model_by_megatron(load)
    common = dist_checkpointing.load_common_state_dict(str(iteration))
    flat = dict(model.named_parameters())[key].data.flatten()
    flat[0], flat[1] = torch.nan, -torch.inf
    shutil.rmtree(iteration)
    iteration.mkdir()
    wanted = {name: common[name] for name in ("args", "iteration", "checkpoint_version")}
    dist_checkpointing.save({**wanted, **model.sharded_state_dict()}, str(iteration))


def test_values_that_are_not_finite_are_refused(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    load = tmp_path / "checkpoints"
    shutil.copytree(checkpoint, load)
    ranks.run(poison, load, "decoder.layers.2.mlp.router.weight", world_size=1)
    message = refusal(ranks, load, tmp_path / "hf")
    assert message.startswith("model.layers.2.mlp.router.gate.weight has 2 values")
    assert files(tmp_path) == ["checkpoints"], "nothing is left of the attempt"


def test_a_tokenizer_that_is_not_there_is_told(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    message = refusal(ranks, checkpoint, tmp_path / "hf", tokenizer=tmp_path / "absent")
    assert f"{tmp_path / 'absent'} holds no tokenizer" in message
    assert files(tmp_path) == []


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)


def test_the_tokenizer_goes_along(ranks: RankPools, checkpoint: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    exported(ranks, checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy = (tmp_path / "hf" / name).read_bytes()
        assert copy == (tmp_path / "tokenizer" / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (0, 1)


# Reading a checkpoint that is not whole, or not one.


def test_a_directory_without_a_checkpoint(ranks: RankPools, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        message = refusal(ranks, path, tmp_path / "hf")
        assert message == (
            f"{path} holds no checkpoint: latest_checkpointed_iteration.txt is not there"
        )


def test_a_pointer_to_an_iteration_that_is_gone(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    load = tmp_path / "checkpoints"
    shutil.copytree(checkpoint, load)
    (load / "iter_0000002/.metadata").unlink()
    message = refusal(ranks, load, tmp_path / "hf")
    assert (
        "iter_0000002 is the newest that was saved, which has no .metadata: it is not whole"
        in message
    )
    assert message.endswith("name the directory of another iteration")


def test_a_pointer_that_is_no_text(ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    message = refusal(ranks, tmp_path, tmp_path / "hf")
    assert "latest_checkpointed_iteration.txt cannot be read: " in message
    assert "\n" not in message


def test_the_directory_of_an_iteration_is_taken_as_well(
    ranks: RankPools, checkpoint: Path, tmp_path: Path
) -> None:
    exported(ranks, checkpoint / "iter_0000002", tmp_path / "hf")
    assert "model.safetensors" in files(tmp_path / "hf")


@pytest.mark.parametrize("damage", ["truncated", "missing", "metadata"])
def test_damage_is_told(ranks: RankPools, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    load = tmp_path / "checkpoints"
    shutil.copytree(checkpoint, load)
    iteration = load / "iter_0000002"
    if damage == "metadata":
        metadata = iteration / ".metadata"
        metadata.write_bytes(metadata.read_bytes()[:100])
    for file in iteration.glob("*.distcp"):
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 20])
        elif damage == "missing":
            file.unlink()
    message = refusal(ranks, load, tmp_path / "hf")
    assert message.startswith(str(iteration))
    assert "cannot be read" in message
    assert files(tmp_path) == ["checkpoints"]


def strip_trinity(rank: int, world_size: int, path: Path) -> None:
    """Write a checkpoint of a model that is not a Trinity model."""
    from argparse import Namespace

    from megatron.core import dist_checkpointing

    iteration = path / "iter_0000007"
    iteration.mkdir(parents=True)
    args = Namespace(num_layers=2, bf16=False, tokenizer_model=None)
    dist_checkpointing.save({"args": args, "iteration": 7}, str(iteration))
    (path / "latest_checkpointed_iteration.txt").write_text("7")


def test_another_models_checkpoint_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    ranks.run(strip_trinity, tmp_path / "other", world_size=1)
    message = refusal(ranks, tmp_path / "other", tmp_path / "hf")
    assert message.endswith("is a checkpoint of another model, not of Trinity")


def read(rank: int, world_size: int, load: Path) -> tuple[int, list[str], dict[str, Tensor], str]:
    from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint
    from megatron_trinity.errors import TrinityError

    checkpoint = TorchDistCheckpoint(load)
    tensors = {key: checkpoint.tensor(key) for key in checkpoint.model_keys()}
    with pytest.raises(TrinityError) as missing:
        checkpoint.tensor("no.such.weight")
    return checkpoint.iteration, checkpoint.model_keys(), tensors, str(missing.value)


def read_by_megatron(rank: int, world_size: int, load: Path) -> dict[str, Tensor]:
    from megatron_trinity.model.shards import whole_tensors

    return whole_tensors(model_by_megatron(load))


def test_the_reader_reads_what_megatron_reads(ranks: RankPools, checkpoint: Path) -> None:
    [(iteration, keys, tensors, missing)] = ranks.run(read, checkpoint, world_size=1)
    [expected] = ranks.run(read_by_megatron, checkpoint, world_size=1)
    assert iteration == 2
    assert keys == sorted(entry.trinity for entry in entries(afmoe_config(**OVERRIDES)))
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
    assert missing == f"{checkpoint / 'iter_0000002'} has no tensor no.such.weight"
