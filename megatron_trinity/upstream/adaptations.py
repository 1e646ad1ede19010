"""The table of all adaptations, in the order in which they are applied.

The `apply` of each imports its own module only when it is called: most of them import
megatron-core, which has to happen after the CPU stand-ins are in place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron_trinity.upstream.registry import Adaptation

_CORE = "0.19.2"


def _install(module: str) -> Callable[[], None]:
    """A function that calls `install()` of a module of this package."""

    def apply() -> None:
        importlib.import_module(f"megatron_trinity.upstream.{module}").install()

    return apply


ADAPTATIONS: tuple[Adaptation, ...] = (
    Adaptation(
        name="quiet",
        symbols=("warnings.filterwarnings",),
        reason="messages at each start that a user cannot act on",
        written_for=_CORE,
        remove_when="the messages are no longer printed",
        when="always",
        apply=_install("quiet"),
    ),
    Adaptation(
        name="cpu-device",
        symbols=("torch.cuda.current_device", "torch.cuda.Stream", "torch.cuda.nvtx.range_push"),
        reason="megatron-core calls torch.cuda for devices, streams and events",
        written_for=_CORE,
        remove_when="megatron-core has a platform interface with a CPU side",
        when="without_cuda",
        apply=_install("cpu.device"),
    ),
    Adaptation(
        name="cpu-placement",
        symbols=(
            "torch.utils._device._device_constructors",
            "torch.Tensor.to",
            "torch.Tensor.type",
        ),
        reason="megatron-core names CUDA devices in tensor constructors",
        written_for=_CORE,
        remove_when="megatron-core asks the platform for its device",
        when="without_cuda",
        apply=_install("cpu.placement"),
    ),
    Adaptation(
        name="cpu-memory",
        symbols=("torch.cuda.memory_stats", "torch.cuda.get_device_properties"),
        reason="memory in the log is that of a CUDA device",
        written_for=_CORE,
        remove_when="megatron-core asks a platform interface for memory",
        when="without_cuda",
        apply=_install("cpu.memory"),
    ),
    Adaptation(
        name="cpu-gloo-devices",
        symbols=(
            "torch.distributed.ProcessGroupGloo.__init__",
            "torch.distributed.ProcessGroupGloo.create_device",
            "torch.distributed.ProcessGroupGloo.create_default_device",
            "torch.distributed.ProcessGroupGloo._Options",
        ),
        reason="each gloo group has a thread that wakes up a hundred times a second",
        written_for=_CORE,
        remove_when="torch shares devices, or gloo's threads sleep until there is something to do",
        when="without_cuda",
        apply=_install("cpu.gloo_devices"),
    ),
    Adaptation(
        name="cpu-jit",
        symbols=("megatron.core.jit.disable_jit_fuser", "megatron.core.jit.noop_decorator"),
        reason="fusions are compiled for a GPU",
        written_for=_CORE,
        remove_when="jit_fuser does nothing without CUDA",
        when="without_cuda",
        apply=_install("cpu.jit"),
    ),
    Adaptation(
        name="cpu-rng",
        symbols=(
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
            "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.add",
            "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
            "megatron.core.tensor_parallel.random.model_parallel_cuda_manual_seed",
        ),
        reason="random states are those of the CUDA generator",
        written_for=_CORE,
        remove_when="the tracker takes the generator of the platform",
        when="without_cuda",
        apply=_install("cpu.rng"),
    ),
    Adaptation(
        name="cpu-moe-dispatch",
        symbols=("megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",),
        reason="split sizes computed on the CPU stay tensors, and all_to_all_single refuses them",
        written_for=_CORE,
        remove_when="the function converts every tensor if as_numpy is set",
        when="without_cuda",
        apply=_install("cpu.moe_dispatch"),
    ),
    Adaptation(
        name="cpu-uneven-collectives",
        symbols=(
            "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
            "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        ),
        reason="gloo gathers and scatters equal parts only",
        written_for=_CORE,
        remove_when="gloo takes unequal parts",
        when="without_cuda",
        apply=_install("cpu.uneven_collectives"),
    ),
    Adaptation(
        name="cpu-startup",
        symbols=("megatron.training.initialize.initialize_megatron",),
        reason="megatron.training refuses to start without CUDA",
        written_for=_CORE,
        remove_when="pretrain passes allow_no_cuda",
        when="without_cuda",
        apply=_install("cpu.startup"),
    ),
    Adaptation(
        name="cpu-async-saves",
        symbols=(
            "megatron.core.dist_checkpointing.strategies.async_utils"
            ".TemporalAsyncCaller.schedule_async_call",
            "megatron.training.async_utils.init_persistent_async_worker",
            "megatron.training.initialize.init_persistent_async_worker",
        ),
        reason="a worker process would get the tensors of the CPU through shared memory",
        written_for=_CORE,
        remove_when="the worker needs no shared memory for tensors on the CPU",
        when="without_cuda",
        apply=_install("cpu.async_saves"),
    ),
    Adaptation(
        name="training-hooks",
        symbols=(
            "megatron.training.training.train_step",
            "megatron.training.training.training_log",
        ),
        reason="the training loop has no hook behind a step, and its log takes no values",
        written_for=_CORE,
        remove_when="the loop takes callbacks, and metrics from the outside",
        when="always",
        apply=_install("training_hooks"),
    ),
    Adaptation(
        name="flops",
        symbols=(
            "megatron.training.training.num_floating_point_operations",
            "megatron.training.training.consume_seqlen_stats_in_iteration",
        ),
        reason="Megatron's count of FLOPs knows neither windows nor the output gate",
        written_for=_CORE,
        remove_when="the loop asks the model for its FLOPs",
        when="always",
        apply=_install("flops"),
    ),
    Adaptation(
        name="optimizer-factory",
        symbols=(
            "megatron.training.training.get_megatron_optimizer",
            "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.get_lr",
        ),
        reason="megatron-core makes its own optimizers alone, and one schedule from the start",
        written_for=_CORE,
        remove_when="its registry takes a whole optimizer, and the schedule takes its start",
        when="always",
        apply=_install("optimizer_factory"),
    ),
    Adaptation(
        name="checkpoint-tracker",
        symbols=("megatron.training.checkpointing.maybe_msc",),
        reason="a full disk leaves the pointer to the newest checkpoint empty",
        written_for=_CORE,
        remove_when="the pointer is written beside and renamed",
        when="always",
        apply=_install("checkpoint_tracker"),
    ),
    Adaptation(
        name="checkpoint-metadata",
        symbols=("megatron.training.checkpointing._build_sharded_state_dict_metadata",),
        reason="a checkpoint without SMEBU's momentum could not be loaded by a run that has it",
        written_for=_CORE,
        remove_when="modules can add to the metadata of a checkpoint",
        when="always",
        apply=_install("checkpoint_metadata"),
    ),
    Adaptation(
        name="checkpoint-pickles",
        symbols=(
            "torch.distributed.checkpoint.filesystem.pickle",
            "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
            "megatron.core.safe_globals.SAFE_GLOBALS",
        ),
        reason="loading a checkpoint executes what its pickles name",
        written_for=_CORE,
        remove_when="metadata and objects are read by restricted unpicklers",
        when="always",
        apply=_install("checkpoint_pickles"),
    ),
    Adaptation(
        name="checkpoint-failures",
        symbols=(
            "megatron.training.training.save_checkpoint",
            "megatron.training.training.load_checkpoint",
            "megatron.training.training.maybe_finalize_async_save",
        ),
        reason="failures to save and load are tracebacks of many ranks",
        written_for=_CORE,
        remove_when="checkpointing raises one kind of error for them",
        when="always",
        apply=_install("checkpoint_failures"),
    ),
    Adaptation(
        name="checkpoint-hooks",
        symbols=(
            "megatron.training.training.save_checkpoint",
            "megatron.training.training.load_checkpoint",
            "megatron.training.checkpointing.get_checkpoint_tracker_filename",
        ),
        reason="nothing is called around a save, nor before a load",
        written_for=_CORE,
        remove_when="checkpointing takes callbacks before and after a save, and before a load",
        when="always",
        apply=_install("checkpoint_hooks"),
    ),
    Adaptation(
        name="checkpoint-sums",
        symbols=(
            "megatron.core.dist_checkpointing.strategies.filesystem_async"
            ".FileSystemWriterAsync.write_preloaded_data",
            "megatron.core.dist_checkpointing.strategies.filesystem_async"
            ".FileSystemWriterAsync.finish",
        ),
        reason="rank 0 alone would read a whole checkpoint for its checksums",
        written_for=_CORE,
        remove_when="writers return checksums of what they have written",
        when="always",
        apply=_install("checkpoint_sums"),
    ),
    Adaptation(
        name="async-saves",
        symbols=(
            "megatron.core.dist_checkpointing.strategies.async_utils"
            ".PersistentAsyncCaller.schedule_async_call",
            "megatron.core.dist_checkpointing.strategies.async_utils"
            ".PersistentAsyncCaller.is_current_async_call_done",
            "megatron.core.dist_checkpointing.strategies.async_utils"
            ".PersistentAsyncCaller.async_loop",
            "megatron.training.initialize.init_persistent_async_worker",
            "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
        ),
        reason="a save in the background has later values of CPU tensors, and waits without end",
        written_for=_CORE,
        remove_when="the worker gets copies, is deaf to SIGTERM, and its end is an error",
        when="always",
        apply=_install("async_saves"),
    ),
    Adaptation(
        name="save-results",
        symbols=(
            "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
            "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
        ),
        reason="each rank starts a process at its first save, though it writes itself",
        written_for=_CORE,
        remove_when="the queue of results is made for saves in the background alone",
        when="always",
        apply=_install("save_results"),
    ),
    Adaptation(
        name="float16-fp32-params",
        symbols=(
            "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.state_dict",
            "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.sharded_state_dict",
            "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.load_state_dict",
        ),
        reason="the bf16 optimizer cannot save fp32 parameters of a bf16 model",
        written_for=_CORE,
        remove_when="its state dicts count fp32_from_fp32_groups",
        when="always",
        apply=_install("float16_fp32_params"),
    ),
    Adaptation(
        name="dataset-helpers",
        symbols=("megatron.core.datasets.utils.compile_helpers",),
        reason="the wheel has no makefile to compile what it ships compiled",
        written_for=_CORE,
        remove_when="compile_helpers looks whether the module is there",
        when="always",
        apply=_install("dataset_helpers"),
    ),
    Adaptation(
        name="distributed-adam-steps",
        symbols=(
            "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
            "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
            "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
            "megatron.core.optimizer.distrib_optimizer"
            ".DistributedOptimizer._set_main_param_and_optimizer_states",
        ),
        reason="torch's Adam has no step counter before its first step, one for all after loading",
        written_for=_CORE,
        remove_when="DistributedOptimizer handles the counter of each parameter",
        when="always",
        apply=_install("distributed_adam_steps"),
    ),
    Adaptation(
        name="adam-state",
        symbols=(
            "megatron.core.optimizer.optimizer.ChainedOptimizer.sharded_state_dict",
            "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
            "megatron.core.optimizer.optimizer.FP32Optimizer.sharded_state_dict",
            "megatron.core.optimizer.distrib_optimizer"
            ".DistributedOptimizer.sharded_param_state_fully_reshardable",
            "megatron.training.checkpointing._build_sharded_state_dict_metadata",
        ),
        reason="state of Adam is saved in a form of its layout, sharding and precision",
        written_for=_CORE,
        remove_when="ChainedOptimizer.sharded_state_dict is the same for every optimizer in it",
        when="always",
        apply=_install("adam_state"),
    ),
    Adaptation(
        name="norm-recompute",
        symbols=(
            "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
            "megatron.core.tensor_parallel.random._get_share_storage",
        ),
        reason="selective recompute of norms needs Transformer Engine, or a compiler",
        written_for=_CORE,
        remove_when="CheckpointWithoutOutput needs neither",
        when="always",
        apply=_install("norm_recompute"),
    ),
    Adaptation(
        name="data-loader-rng",
        symbols=("megatron.training.datasets.data_samplers.build_pretraining_data_loader",),
        reason="starting a data loader moves the random state that a resumed run has restored",
        written_for=_CORE,
        remove_when="data loaders get a generator of their own",
        when="always",
        apply=_install("data_loader_rng"),
    ),
)
