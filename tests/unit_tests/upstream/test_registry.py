"""The table of adaptations against the installed megatron-core."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import types
from importlib import metadata
from itertools import combinations
from pathlib import Path

import pytest

from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream import adapt_megatron
from megatron_trinity.upstream.adaptations import ADAPTATIONS, MODULES, in_order, needed_adaptations
from megatron_trinity.upstream.registry import Adaptation, check_symbols, rebind, resolve
from megatron_trinity.upstream.version import (
    OVERRIDE_VARIABLE,
    SUPPORTED_MEGATRON_CORE,
    check_version,
)
from tests.paths import ROOT

# First 16 hex digits of the SHA-256 of each upstream definition, without comments and layout.
FINGERPRINTS: dict[str, str] = {
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync": (
        "8686bdc99a75bc87"
    ),
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.reset": (
        "54d30b2d665a5ead"
    ),
    "megatron.training.models.dist_utils._ddp_wrap": "ce6bfe417a12fd35",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    "._copy_main_params_to_model_params": "2c54e5f1a5415862",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    "._get_model_param_range_map": "df0f03d1b441f5d4",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.compute_full_param_layout": (
        "21699e5d50a2b60e"
    ),
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.check_grads": (
        "b0ebbcb5b563327e"
    ),
    "megatron.core.rerun_state_machine.RerunStateMachine._reduce_any": "14be74e3dbf7e7fd",
    "megatron.core.timers.Timer.elapsed": "99a0474a4164b3e6",
    "megatron.core.utils.local_multi_tensor_l2_norm": "afdb0d1778923660",
    "megatron.training.utils.common_utils.print_rank_0": "80086c4e1320d049",
    "megatron.training.utils.common_utils.print_rank_last": "d395c5297eda5343",
    "megatron.training.utils.common_utils.reduce_max_stat_across_model_parallel_group": (
        "8ab40e5c08c5f1ac"
    ),
    "megatron.training.utils.common_utils.logical_and_across_model_parallel_group": (
        "9dbc211532df8b59"
    ),
    "megatron.core.rerun_state_machine.RerunStateMachine.should_checkpoint_and_exit": (
        "7bc2521da9824da1"
    ),
    "megatron.core.optimizer.optimizer.ChainedOptimizer.get_grad_norm": "9f63de367c412ace",
    "megatron.core.optimizer.optimizer.ChainedOptimizer.step_with_ready_grads": "44ff5d7800c5e929",
    "megatron.core.rerun_state_machine.RerunStateMachine.validate_result": "53f746ba2f9f5640",
    "megatron.core.rerun_state_machine.RerunStateMachine.should_run_forward_backward": (
        "03aa6443c264b215"
    ),
    "megatron.core.datasets.utils.compile_helpers": "6891d190987884a0",
    "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
    ".async_loop": "803f760e9eab3a1f",
    "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
    ".is_current_async_call_done": "5827cec3ba3043ad",
    "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
    ".schedule_async_call": "b076a70edabf0d4f",
    "megatron.core.dist_checkpointing.strategies.async_utils.TemporalAsyncCaller"
    ".schedule_async_call": "b9467156ea42104f",
    "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
    ".finish": "6afd403b0f2ec9ab",
    "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
    ".write_preloaded_data": "48dda3d850384b47",
    "megatron.core.dist_checkpointing.strategies.filesystem_async"
    ".get_write_results_queue": "650a64b7c69c1994",
    "megatron.core.jit.disable_jit_fuser": "efcf8b826bd9c8d7",
    "megatron.core.jit.noop_decorator": "ddfdca97985485e3",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    "._set_main_param_and_optimizer_states": "f078300380c9b3e5",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    ".load_state_dict": "623633566a81bd56",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    ".sharded_param_state_fully_reshardable": "5a4e15ccca0b413b",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict": "63da58a721daf861",
    "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict": "779d9c0b2aca7168",
    "megatron.core.optimizer.optimizer.ChainedOptimizer.sharded_state_dict": "882a4cd8674b9a9c",
    "megatron.core.optimizer.optimizer.FP32Optimizer.sharded_state_dict": "d8fee0ea56a6562c",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params"
    ".load_state_dict": "a803b63b0892ce1b",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params"
    ".sharded_state_dict": "48286ad348ab95e4",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params"
    ".state_dict": "6012401affabbd50",
    "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.get_lr": "d3d82ab61bd1afda",
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim": "9ca7b839235cfbc3",
    "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim": "f85c2232842ad481",
    "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__": "a09f1ea5661fe43e",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.add": "8da82893ff102dd6",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork": "98066488ba7ec53a",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": "de1366f01102a03f",
    "megatron.core.tensor_parallel.random._get_share_storage": "743578801538417c",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "5a49a6e91b14818e",
    "megatron.core.tensor_parallel.random.model_parallel_cuda_manual_seed": "40faa191065121d1",
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": "d48cb2407326de4b",
    "megatron.training.async_utils.init_persistent_async_worker": "1dc90e6613134709",
    "megatron.training.checkpointing._build_sharded_state_dict_metadata": "2dce8ee48675ed63",
    "megatron.training.checkpointing.get_checkpoint_tracker_filename": "c55370c737d4740c",
    "megatron.training.datasets.data_samplers.build_pretraining_data_loader": "b6568c175ebdb18c",
    "megatron.training.initialize.initialize_megatron": "8fe56d11efb14104",
    "megatron.training.training.build_train_valid_test_data_iterators": "e9cb1d9938fbbce7",
    "megatron.training.training.consume_seqlen_stats_in_iteration": "d3e918d3862cfdbd",
    "megatron.training.training.evaluate": "0531c445cb0eea0f",
    "megatron.training.training.checkpoint_and_decide_exit": "9698928544cfed9c",
    "megatron.training.training.save_checkpoint_and_time": "d526e97cbdb6bf51",
    "megatron.training.ft_integration.on_eval_step_end": "e311e59332a03e89",
    "megatron.training.training.evaluate_and_print_results": "3f2914b37a4096bb",
    "megatron.training.training.get_train_valid_test_num_samples": "84c82ad2d0ac45d9",
    "megatron.training.training.num_floating_point_operations": "8b304ea7e2ac3ff2",
    "megatron.training.training.train_step": "24a1feeb0a08d846",
    "megatron.training.training.training_log": "2da9e48509db96c4",
}


def _definition(symbol: str) -> str | None:
    """Source of the function or class that `symbol` names; None if it is a variable.

    From the installed file, since the object in this process may have been replaced.
    """
    parts = symbol.split(".")
    root = Path(str(metadata.distribution("megatron-core").locate_file("")))
    for cut in range(len(parts), 0, -1):
        file = root.joinpath(*parts[:cut]).with_suffix(".py")
        if not file.is_file():
            continue
        source = file.read_text()
        node: ast.AST = ast.parse(source)
        for name in parts[cut:]:
            found = [
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == name
            ]
            if not found:
                return None
            node = found[-1]
        return ast.get_source_segment(source, node)
    raise AssertionError(f"no file for {symbol}")


def _fingerprint(symbol: str) -> str | None:
    source = _definition(symbol)
    if source is None:
        return None
    lines = [line.strip() for line in source.splitlines()]
    text = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _megatron_symbols() -> list[tuple[str, str]]:
    return [(a.name, s) for a in ADAPTATIONS for s in a.symbols if s.startswith("megatron.")]


def _example(**changes: object) -> Adaptation:
    fields: dict[str, object] = {
        "name": "example",
        "symbols": ("megatron.core.utils.divide",),
        "reason": "r",
        "written_for": "0.19.2",
        "remove_when": "w",
    }
    return Adaptation(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("adaptation", ADAPTATIONS, ids=lambda a: a.name)
def test_every_symbol_resolves(adaptation: Adaptation) -> None:
    adapt_megatron()
    check_symbols(adaptation, metadata.version("megatron-core"))
    assert adaptation.reason
    assert adaptation.remove_when
    assert adaptation.written_for.startswith("megatron-core 0.19.2")


@pytest.mark.parametrize(("name", "symbol"), _megatron_symbols())
def test_upstream_definitions_are_the_ones_adapted(name: str, symbol: str) -> None:
    found = _fingerprint(symbol)
    if found is None:
        assert symbol not in FINGERPRINTS
        return
    assert FINGERPRINTS.get(symbol) == found, (
        f"{symbol} is not what adaptation {name!r} was written for: read it again, with the "
        f"head of the adaptation, then record its fingerprint {found!r} here"
    )


def test_no_fingerprint_is_left_over() -> None:
    assert set(FINGERPRINTS) <= {symbol for _, symbol in _megatron_symbols()}


def test_every_adaptation_declares_itself_in_a_file_of_its_name() -> None:
    assert len(ADAPTATIONS) == len(MODULES)
    for adaptation in ADAPTATIONS:
        module = MODULES[adaptation.name]
        place = module.__name__.removeprefix("megatron_trinity.upstream.")
        assert adaptation.name == place.replace(".", "-").replace("_", "-")
        assert (adaptation.when == "without_cuda") == place.startswith("cpu.")
        assert callable(module.install)
        assert module.__doc__


def test_the_table_is_read_without_megatron_core() -> None:
    program = (
        "import sys, megatron_trinity.upstream; print('torch' in sys.modules);"
        "import megatron_trinity.upstream.adaptations as found;"
        "print(len(found.ADAPTATIONS), [m for m in sys.modules if m.startswith('megatron.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"False\n{len(ADAPTATIONS)} []\n", done.stderr


def _behind(name: str) -> set[str]:
    """Whatever an adaptation is made after, and what those are made after."""
    after = next(a for a in ADAPTATIONS if a.name == name).after
    return set(after).union(*map(_behind, after))


def test_adaptations_of_one_symbol_say_their_order() -> None:
    for one, other in combinations(ADAPTATIONS, 2):
        if set(one.symbols) & set(other.symbols):
            assert one.name in _behind(other.name), (one.name, other.name)


def test_every_import_of_megatron_core_is_behind_the_stand_ins() -> None:
    order = [a.name for a in ADAPTATIONS]
    first = min(order.index(a.name) for a in ADAPTATIONS if _touches_megatron(a))
    assert order[first] == "cpu-jit"
    stand_ins = {"cpu-device", "cpu-memory", "cpu-packages", "cpu-placement"}
    assert {"quiet", *stand_ins} == _behind("cpu-jit")
    assert all(
        "cpu-jit" in _behind(a.name)
        for a in ADAPTATIONS
        if a.when == "without_cuda" and _touches_megatron(a) and a.name != "cpu-jit"
    )


def _touches_megatron(adaptation: Adaptation) -> bool:
    return any(symbol.startswith("megatron.") for symbol in adaptation.symbols)


def test_order_is_by_name_but_for_what_comes_after() -> None:
    cpu = _example(name="z", when="without_cuda")
    late = _example(name="a", after=("c",))
    found = in_order([late, _example(name="b"), _example(name="c"), cpu])
    assert [a.name for a in found] == ["z", "c", "a", "b"]
    with pytest.raises(ValueError, match=r"'example' is after 'gone', which there is not"):
        in_order([_example(after=("gone",))])
    with pytest.raises(ValueError, match="two adaptations have one name"):
        in_order([_example(), _example()])
    with pytest.raises(ValueError, match="wait for each other: a, b, a"):
        in_order([_example(name="a", after=("b",)), _example(name="b", after=("a",))])


def test_with_cuda_no_stand_in_is_installed() -> None:
    with_cuda = needed_adaptations(cuda_available=True)
    assert with_cuda
    assert all(a.when == "always" for a in with_cuda)
    assert not any(a.name.startswith("cpu-") for a in with_cuda)
    assert needed_adaptations(cuda_available=False) == ADAPTATIONS
    assert all(a.when == "without_cuda" for a in ADAPTATIONS if a.name.startswith("cpu-"))


def test_missing_symbol_is_named() -> None:
    gone = _example(symbols=("megatron.core.utils.no_such_function",))
    with pytest.raises(TrinityError, match=r"'example' touches megatron\.core\.utils\.no_such"):
        check_symbols(gone, "0.20.0")
    gone = _example(symbols=("megatron.core.no_such_module.f",))
    with pytest.raises(TrinityError, match=r"megatron-core 0\.20\.0 no longer has"):
        check_symbols(gone, "0.20.0")


def test_resolve_finds_methods() -> None:
    assert resolve("pathlib.Path.read_text") is Path.read_text
    with pytest.raises(AttributeError):
        resolve("pathlib.Path.no_such_method")


def test_rebind_reaches_copies_of_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def original() -> int:
        return 1

    def replacement() -> int:
        return 2

    home, importer, stranger = (types.ModuleType(n) for n in ("pkg_x", "pkg_x.sub", "pkg_xy"))
    for module in (home, importer, stranger):
        module.function = original  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    rebind(original, replacement, package="pkg_x")
    assert home.function() == 2
    assert importer.function() == 2
    assert stranger.function() == 1


def test_supported_version_passes_and_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE_VARIABLE, raising=False)
    check_version(SUPPORTED_MEGATRON_CORE)
    with pytest.raises(TrinityError) as refusal:
        check_version("0.18.0")
    for part in ("0.18.0", "0.19.2", "pip install", OVERRIDE_VARIABLE):
        assert part in str(refusal.value)


def test_override_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE_VARIABLE, "1")
    with pytest.warns(UserWarning, match=r"megatron-core 0\.18\.0 is untested") as warned:
        check_version("0.18.0")
    assert len(warned) == 1


def test_adapting_twice_changes_nothing() -> None:
    import torch

    adapt_megatron()
    zeros, to = torch.zeros, torch.Tensor.to
    adapt_megatron()
    assert torch.zeros is zeros
    assert torch.Tensor.to is to
