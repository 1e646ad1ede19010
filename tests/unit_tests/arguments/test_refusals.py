"""The table of refusals: every row has a case, and tells what to do in one line."""

from __future__ import annotations

import copy
import math
import re
from argparse import Namespace
from typing import Any

import pytest

from megatron_trinity.arguments.precision import TUNING
from megatron_trinity.arguments.refusals import REFUSALS, validate
from megatron_trinity.errors import UsageError
from tests.distributed.pool import RankPools

TP_2: dict[str, Any] = {
    "world_size": 2,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
}
CP_2: dict[str, Any] = {"world_size": 2, "context_parallel_size": 2}
FP8: dict[str, Any] = {
    "precision": "fp8-blockwise",
    "transformer_impl": "transformer_engine",
    "moe_grouped_gemm": True,
}
PROFILE: dict[str, Any] = {
    "profile": True,
    "use_pytorch_profiler": True,
    "tensorboard_dir": "log",
    "profile_step_start": 1,
    "profile_step_end": 3,
}

# Row -> what of the tiny preset's arguments differs, one or more ways. Rows that are tested for the
# boundary have one case on its wrong side each; ACCEPTED has the right side.
CASES: dict[str, list[dict[str, Any]]] = {
    "no-model": [
        {"num_layers": None},
        {"hidden_size": None},
        {"num_attention_heads": None},
        {"num_experts": None},
        {"moe_ffn_hidden_size": None},
        {"sliding_window": None},
        {"seq_length": None},
        {"max_position_embeddings": None},
        {"micro_batch_size": None},
    ],
    "head-size": [
        {"kv_channels": None, "hidden_size": 190},
        {"kv_channels": None, "hidden_size": 198},
    ],
    "head-size-odd": [{"kv_channels": 7}, {"kv_channels": 1}],
    "dense-size": [
        {"ffn_hidden_size": 511},
        {**TP_2, "ffn_hidden_size": 510},
    ],
    "attention-backend": [{"attention_backend": "local"}],
    "parallel-sizes": [
        {"tensor_model_parallel_size": 0},
        {"pipeline_model_parallel_size": -1},
        {"expert_model_parallel_size": 0},
        {"expert_tensor_parallel_size": 0},
    ],
    "window-too-small": [{"sliding_window": 0}, {"sliding_window": -1}],
    "global-every": [{"global_attn_every_n_layers": 0}],
    "dense-layers": [{"num_dense_layers": 4}, {"num_dense_layers": -1}],
    "shared-experts": [{"num_shared_experts": -1}],
    "topk": [{"moe_router_topk": 0}, {"moe_router_topk": 9}],
    "model-ranks": [
        {"tensor_model_parallel_size": 2},
        {"world_size": 6, "pipeline_model_parallel_size": 4},
    ],
    "expert-ranks": [
        {"expert_model_parallel_size": 2},
        {"world_size": 4, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2},
        {"world_size": 6, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": None},
    ],
    "experts-over-ranks": [{"world_size": 3, "expert_model_parallel_size": 3}],
    "tensor-over-groups": [
        {"world_size": 3, "tensor_model_parallel_size": 3, "expert_tensor_parallel_size": 1}
    ],
    "tensor-without-sequence": [{"world_size": 2, "tensor_model_parallel_size": 2}],
    "heads-over-groups": [{"num_attention_heads": 7}],
    "heads-over-tensor": [
        {
            "world_size": 4,
            "tensor_model_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
        }
    ],
    "experts-over-tensor": [
        {"world_size": 2, "moe_ffn_hidden_size": 127, "expert_tensor_parallel_size": 2},
        {**TP_2, "moe_ffn_hidden_size": 127, "expert_tensor_parallel_size": None},
    ],
    "context-parallel-kind": [
        {**CP_2, "cp_comm_type": ["p2p"]},
        {**CP_2, "cp_comm_type": ["a2a", "a2a", "p2p", "a2a"]},
        {**CP_2, "cp_comm_type": ["a2a+p2p"]},
    ],
    "context-parallel-heads": [
        {"world_size": 4, "context_parallel_size": 4, "cp_comm_type": ["a2a"]},
        {**TP_2, "world_size": 4, "context_parallel_size": 2, "cp_comm_type": ["a2a"]},
    ],
    "context-parallel-length": [{**CP_2, "seq_length": 254}],
    "sequence-parallel-length": [{**TP_2, "seq_length": 255}],
    "hybrid-context-parallel": [
        {"hybrid_context_parallel": True},
        {**CP_2, "hierarchical_context_parallel_sizes": [2]},
    ],
    "recompute-layers": [{"recompute_granularity": "full", "recompute_method": "uniform"}],
    "batch-over-ranks": [
        {"global_batch_size": 12},
        {"world_size": 3, "global_batch_size": 32},
    ],
    "no-length": [{"train_iters": None}, {"train_iters": 0}, {"train_iters": -5}],
    "schedule-iters": [{"lr_decay_iters": 0}, {"lr_decay_iters": -90}],
    "schedule-samples": [{"train_samples": 9, "lr_decay_samples": 0, "lr_wsd_decay_iters": None}],
    "warm-up-iters": [{"lr_warmup_iters": 10}, {"lr_warmup_iters": 11}, {"lr_warmup_iters": -1}],
    "warm-up-samples": [
        {
            "train_samples": 9,
            "lr_decay_samples": 9,
            "lr_warmup_samples": 9,
            "lr_wsd_decay_iters": None,
        }
    ],
    "decay-iters": [{"lr_wsd_decay_iters": -1}],
    "decay-samples": [
        {
            "train_samples": 9,
            "lr_decay_samples": 9,
            "lr_wsd_decay_samples": -1,
            "lr_wsd_decay_iters": None,
        }
    ],
    "warm-up-fraction": [{"lr_warmup_fraction": 1.0}, {"lr_warmup_fraction": -0.1}],
    "decay-unit": [{"lr_wsd_decay_samples": 5}, {"train_samples": 9, "lr_decay_samples": 9}],
    "no-rate": [{"lr": None}],
    "rate-order": [{"lr": -1.0}, {"min_lr": 1.0}, {"min_lr": -1.0}, {"lr_warmup_init": 1.0}],
    "weight-decay": [{"weight_decay": -0.1}, {"weight_decay": float("nan")}],
    "weight-decay-ramp": [
        {"optimizer": "adam", "weight_decay_incr_style": "linear", **ramp}
        for ramp in (
            {"start_weight_decay": 0.2, "end_weight_decay": 0.1},
            {"start_weight_decay": -0.2, "end_weight_decay": 0.1},
            {"start_weight_decay": 0.2, "end_weight_decay": None},
        )
    ],
    "batch-ramp": [{"step_batch_size_schedule": "0:32 1M:36"}],
    "optimizer": [{"optimizer": name} for name in ("dist_muon", "adaptive_muon", "sgd", "lion")],
    "adam-betas": [
        {"adam_beta1": 1.0},
        {"adam_beta1": -0.1},
        {"adam_beta2": 1.0},
        {"adam_beta2": float("nan")},
    ],
    "optimizer-instances": [{"world_size": 4, "num_distributed_optimizer_instances": 2}],
    "muon-rates": [{"adamw_lr": None}, {"decoupled_lr": 1e-3}],
    "muon-rate-order": [
        {"adamw_min_lr": 1.0},
        {"adamw_min_lr": -1.0},
        {"adamw_lr": 1e-4, "lr_warmup_init": 1e-3},
    ],
    "muon-decay-ramp": [{"weight_decay_incr_style": "linear"}],
    "muon-precision": [{"fp16": True}, {"fp8_param_gather": True}, {"fp4_param_gather": True}],
    "muon-sharding": [{"use_megatron_fsdp": True}, {"use_torch_fsdp2": True}],
    "muon-modes": [
        {"muon_tp_mode": "blockwise"},
        {"muon_tp_mode": "distributed"},
        {"muon_split_qkv": False},
        {"muon_scale_mode": "spectral"},
        {"muon_scalar_optimizer": "lion"},
        {"muon_extra_scale_factor": 0.2},
    ],
    "muon-newton-schulz": [
        {"muon_coefficient_type": "cubic"},
        {"muon_coefficient_type": "custom"},
        {"muon_num_ns_steps": 0},
        {"muon_fp32_matmul_prec": "low"},
        {"muon_momentum": 1.0},
        {"muon_momentum": float("nan")},
    ],
    "param-gather": [
        {"overlap_param_gather": True, "use_distributed_optimizer": True},
        {"overlap_param_gather": True, "overlap_grad_reduce": True},
    ],
    "buckets": [{"ddp_bucket_size": 1000, "ddp_num_buckets": 2}],
    "muon-overlap": [
        {"overlap_param_gather_with_optimizer_step": True},
        {"optimizer_cpu_offload": True},
        {"optimizer_cuda_graph": True},
        {"use_precision_aware_optimizer": True},
    ],
    "muon-checkpoint": [{"load_main_params_from_ckpt": True}],
    "muon-rank-files": [{"ckpt_format": "torch", "use_distributed_optimizer": True}],
    "checkpoint-format": [{"ckpt_format": "torch_dcp"}, {"ckpt_format": "fsdp_dtensor"}],
    "save-interval": [{"save": "run"}],
    "save": [
        {"save_interval": 2},
        {"save_params_interval": 2},
        {"save_wgrads_interval": 2},
        {"save_tokens_per_expert_interval": 2},
    ],
    "keep-numbers": [{"keep_last_checkpoints": 0}, {"keep_every_iterations": -1}],
    "save-silence": [{"save_silence": 59.0}, {"save_silence": float("nan")}],
    "keep-every": [{"save": "run", "keep_every_iterations": 5, "save_interval": 10}],
    "retain-interval": [{"save_retain_interval": 10}],
    "non-persistent": [{"non_persistent_ckpt_type": "global"}, {"non_persistent_save_interval": 1}],
    "convert-format": [{"ckpt_convert_format": "torch"}],
    "integrity": [{"verify_integrity": True}],
    "storage-client": [{"enable_msc": True}],
    "async-format": [{"async_save": True, "ckpt_format": "torch", "optimizer": "adam"}],
    "async-strategy": [{"async_save": True, "async_strategy": "nvrx"}],
    "async-worker": [{"async_save": True, "use_persistent_ckpt_worker": False}],
    "loss-fusion": [{"cross_entropy_loss_fusion": True}],
    "mock-data": [
        {"mock_data": True, "data_path": ["a"], "split": "98,2,0"},
        {"mock_data": True, "valid_data_path": ["a"]},
        {"mock_data": True, "per_split_data_args_path": "a.json"},
    ],
    "cyclic": [{"dataloader_type": "cyclic"}],
    "packing-sources": [
        {"packing": "in-order", "mock_data": True},
        {"packing": "in-order", "data": "a.yaml"},
    ],
    "document-buffer": [{"document_buffer_size": 4}, {"document_buffers": 4, "packing": "greedy"}],
    "packing-documents": [
        {"packing": "document-buffer", "dataloader_inter_document_masking": False},
        {"packing": "best-fit", "dataloader_inter_document_masking": False},
    ],
    "data-sources": [
        {"data": "a.yaml", "train_data_path": ["a"]},
        {"data_path": ["a"], "split": "98,2,0", "train_data_path": ["a"]},
        {"data_path": ["a"], "split": "98,2,0", "data_args_path": "a.txt"},
        {"test_data_path": ["a"], "per_split_data_args_path": "a.json"},
    ],
    "split": [
        {"data_path": ["a"], "split": text} for text in ("0,0,0", "a", "98,-2,4", "1,2,3,4", "")
    ],
    "split-of-splits": [{"train_data_path": ["a"], "split": "98,2,0"}, {"split": "98,2,0"}],
    "null-tokenizer": [{"tokenizer_type": "NullTokenizer", "vocab_size": None}],
    "evaluation": [{"eval_interval": 0}, {"eval_interval": -1}, {"eval_iters": -1}],
    "full-validation": [{"full_validation": True}],
    "document-mask": [{"reset_attention_mask": True}],
    "document-positions": [{"reset_position_ids": True}],
    "sft": [{"sft": True}],
    "attention-mask": [{"create_attention_mask_in_dataloader": True}],
    "router": [
        {"moe_router_score_function": "softmax"},
        {"moe_router_enable_expert_bias": False},
        {"moe_router_load_balancing_type": "aux_loss"},
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]},
    ],
    "balancing-rates": [
        {"moe_router_bias_update_rate": 0.0},
        {"smebu_kappa": -2.0},
        {"smebu_lambda": 0.0},
        {"smebu_beta": 1.0},
        {"smebu_beta": -0.1},
    ],
    "balancing-unused": [
        {"load_balancing": "none", "moe_router_bias_update_rate": 0.01},
        {"load_balancing": "smebu", "moe_router_bias_update_rate": 0.01},
        {"load_balancing": "sign", "smebu_kappa": 1.0},
        {"load_balancing": "none", "smebu_beta": 0.9},
    ],
    "loss-weights": [
        {"seq_aux_loss_coeff": -1e-4},
        {"z_loss_coeff": -1e-6},
        {"z_loss_start_iteration": -1},
    ],
    "loss-chunk": [{"loss_chunk_size": -1}],
    "alarm-window": [{"alarm_window": 16}, {"alarm_window": 30}],
    "exit-within": [{"exit_within": 0.0}, {"exit_within": math.nan}],
    "hang-minutes": [{"hang_minutes": -1.0}],
    "exit-signal-handler": [
        {"exit_signal_handler": True},
        {"exit_signal_handler_for_training": True},
        {"exit_signal_handler_for_dataloader": True},
    ],
    "spike-factor": [{"spike_factor": 1.0}, {"spike_factor": -2.0}],
    "spike-action": [{"spike_action": "skip"}],
    "spike-rewind": [
        {"spike_action": "rewind", "spike_factor": 3.0, "save": "a", "save_interval": 1}
    ],
    "spike-window": [{"spike_window": 3}],
    "spike-skips": [{"spike_skips": 0}],
    "skip-nonfinite-steps": [{"skip_nonfinite_steps": -1}],
    "log-progress": [{"log_progress": True}],
    "wandb-unused": [{"wandb_exp_name": "a"}, {"wandb_save_dir": "a"}, {"wandb_entity": "a"}],
    "wandb-name": [{"wandb_project": "a", "wandb_save_dir": "b"}],
    "wandb-directory": [{"wandb_project": "a", "wandb_exp_name": "b"}],
    "wandb-log": [{"wandb_project": "a", "wandb_exp_name": "b", "wandb_save_dir": "c"}],
    "wandb": [
        {
            "wandb_project": "a",
            "wandb_exp_name": "b",
            "wandb_save_dir": "c",
            "tensorboard_dir": "log",
        }
    ],
    "profiler": [{"use_pytorch_profiler": True}],
    "profile-of-cuda": [{"profile": True}],
    "profile-directory": [{**PROFILE, "tensorboard_dir": None}],
    "profile-steps": [
        {**PROFILE, "profile_step_start": 3},
        {**PROFILE, "profile_step_start": -1},
        {**PROFILE, "profile_step_end": 11},
    ],
    "profile-ranks": [{**PROFILE, "profile_ranks": [0, 1]}, {**PROFILE, "profile_ranks": [-1]}],
    "log-memory": [{"log_memory_interval": 15}],
    "router-extras": [
        {"moe_expert_capacity_factor": 1.0},
        {"moe_z_loss_coeff": 1e-3},
        {"moe_router_num_groups": 2},
        {"moe_router_fusion": True},
        {"moe_enable_routing_replay": True},
    ],
    "other-activations": [
        {"swiglu": False},
        {"squared_relu": True},
        {"quick_geglu": True},
        {"add_bias_linear": True},
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
        {"moe_apply_probs_on_input": True},
        {"moe_latent_size": 64},
    ],
    "recompute-of-others": [
        {"recompute_granularity": "selective", "recompute_modules": ["moe", module]}
        for module in ("moe_act", "mla_up_proj", "gdn_norm_out")
    ],
    "dropout": [{"attention_dropout": 0.1}, {"hidden_dropout": 0.1}],
    "mup": [{"use_mup": True}],
    "checkpoint-args": [{"use_checkpoint_args": True}],
    "other-models": [
        {"multi_latent_attention": True},
        {"mtp_num_layers": 1},
        {"hybrid_layer_pattern": "M*M*"},
    ],
    "layers-of-others": [
        {"tp_comm_overlap": True},
        {"moe_grouped_gemm": True},
        {"use_te_activation_func": True},
        {"fused_residual_rmsnorm": True},
        {"use_transformer_engine_op_fuser": True},
        {"moe_single_grouped_weight": True},
        {"moe_single_grouped_bias": True},
        {"use_grouped_gemm_for_dense_mlp": True},
        {"use_grouped_gemm_for_shared_expert": True},
        {"fine_grained_activation_offloading": True},
        {"use_kitchen_attention": True},
        {"flash_attention_version": 3},
        {"use_flash_attn": True},
        {"attention_backend": "flash"},
        {"attention_backend": "fused"},
    ],
    "deterministic-exchange": [
        {"deterministic_mode": True, "moe_token_dispatcher_type": "flex"},
    ],
    "fp8-of-others": [{"precision": "fp8-blockwise"}, {"precision": "fp8-delayed"}],
    "fp8-history": [
        {**FP8, "fp8_margin": 0},
        {**FP8, "precision": "fp8-tensorwise", "fp8_amax_history_len": 1},
        {"fp8_amax_compute_algo": "max"},
        {"precision": "bf16", "fp8_margin": 1},
    ],
    "layers-in-bf16": [{"first_last_layers_bf16": True}],
    "number-of-layers-in-bf16": [
        {**FP8, "num_layers_at_start_in_bf16": 1},
        {"num_layers_at_end_in_bf16": 2},
    ],
    "too-many-layers-in-bf16": [
        {**FP8, "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 5},
        {**FP8, "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": -1},
    ],
    "delayed-layers-in-bf16": [
        {**FP8, "precision": "fp8-delayed", "first_last_layers_bf16": True},
    ],
    "delayed-recompute": [
        {
            **FP8,
            "precision": "fp8-delayed",
            "recompute_granularity": "selective",
            "recompute_modules": ["layernorm"],
        },
    ],
    # On the wrong side by the least: 8 short of a multiple of 16, and 16 of one of 32.
    "fp8-hidden-size": [
        {**FP8, "hidden_size": 200},
        {**FP8, "precision": "fp8-mxfp8", "hidden_size": 208},
    ],
    "fp8-heads": [{**FP8, "kv_channels": 4, "num_attention_heads": 6}],
    "fp8-queries-gates-keys-and-values": [
        {**FP8, "precision": "fp8-mxfp8", "kv_channels": 4, "num_attention_heads": 8},
    ],
    "fp8-dense-layers": [{**FP8, "ffn_hidden_size": 504}, {**FP8, **TP_2, "ffn_hidden_size": 528}],
    "fp8-routed-experts": [
        {**FP8, "moe_ffn_hidden_size": 120},
        {**FP8, **TP_2, "expert_tensor_parallel_size": 2, "moe_ffn_hidden_size": 144},
    ],
    "fp8-shared-experts": [{**FP8, "moe_shared_expert_intermediate_size": 120}],
    "fp8-tokens": [
        {**FP8, "micro_batch_size": 1, "seq_length": 200, "sliding_window": 8},
        {**FP8, **TP_2, "micro_batch_size": 1, "seq_length": 16, "sliding_window": 8},
    ],
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "the preset": {},
    "a window of one token": {"sliding_window": 1},
    "an exchange in any order": {"moe_token_dispatcher_type": "flex"},
    "attention of torch's own choice": {"attention_backend": "auto"},
    "FP8": FP8,
    "FP8 by tensor-parallel ranks": {**FP8, **TP_2},
    "FP8 with past scales": {
        **FP8,
        "precision": "fp8-delayed",
        "fp8_margin": 1,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "most_recent",
    },
    "FP8 in multiples of 32": {**FP8, "precision": "fp8-mxfp8"},
    "FP8 but for the ends": {
        **FP8,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 4,
        "num_layers_at_end_in_bf16": 0,
    },
    "other layers": {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True},
    "every layer global": {"global_attn_every_n_layers": 1},
    "no dense layer": {"num_dense_layers": 0},
    "one MoE layer": {"num_dense_layers": 3},
    "no shared expert": {"num_shared_experts": 0},
    "top-1": {"moe_router_topk": 1},
    "every expert": {"moe_router_topk": 8},
    "tensor parallel": TP_2,
    "more tensor-parallel ranks than groups": {
        "world_size": 6,
        "sequence_parallel": True,
        "tensor_model_parallel_size": 6,
        "expert_tensor_parallel_size": 1,
        "ffn_hidden_size": 516,
        "seq_length": 252,
        "global_batch_size": None,
    },
    "context parallel": CP_2,
    "context parallel by heads": {**CP_2, "cp_comm_type": ["a2a"]},
    "tensor and context parallel": {**TP_2, "world_size": 4, "context_parallel_size": 2},
    "documents kept apart": {"dataloader_inter_document_masking": True},
    "expert parallel": {"world_size": 4, "expert_model_parallel_size": 4},
    "expert and expert tensor parallel": {
        "world_size": 4,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
    "pipeline": {"world_size": 4, "pipeline_model_parallel_size": 4},
    "data parallel": {"world_size": 4},
    "SMEBU of one's own": {"load_balancing": "smebu", "smebu_lambda": 1e-3},
    "a sign rule of one's own": {"moe_router_bias_update_rate": 0.01},
    "recompute of modules": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp", "shared_experts", "moe"],
    },
    "a warm-up of all but a step": {"lr_warmup_iters": 9},
    "no decay": {"lr_wsd_decay_iters": 0},
    "heads of a size that follows": {"kv_channels": None, "num_attention_heads": 4},
    "a hidden size that is odd": {"hidden_size": 191},
    "a dense size of even halves": {**TP_2, "ffn_hidden_size": 508},
    "a profile to the last step": {**PROFILE, "profile_step_end": 10, "profile_ranks": [0]},
    "a profile of a run in samples": {
        **PROFILE,
        "train_iters": None,
        "train_samples": 9,
        "lr_decay_samples": 9,
        "lr_wsd_decay_iters": None,
    },
    "memory at every second log line": {"log_memory_interval": 20},
    "recompute of layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "no evaluation": {"eval_iters": 0},
    "data with shares": {"data_path": ["a"], "split": " 969, 30.5, .5"},
    "training alone": {"data_path": ["a"], "split": "1"},
    "data by split": {"train_data_path": ["a"], "valid_data_path": ["a"]},
    "no training": {"skip_train": True, "train_iters": None, "lr": None},
    "no global batch": {"global_batch_size": None},
    "no load balancing, as a list": {"moe_router_load_balancing_type": ["none"]},
}


def tiny_arguments(rank: int, world_size: int) -> Namespace:
    from megatron_trinity.arguments.parse import parse_arguments

    return parse_arguments(["--preset", "tiny", "--train-iters", "10"])


@pytest.fixture(scope="module")
def tiny(ranks: RankPools) -> Namespace:
    """Parsed by the trainer itself, so that every argument has the name and type it has there."""
    [args] = ranks.run(tiny_arguments, world_size=1)
    # As they are when refusals look at them: None but for what is given.
    vars(args).update(dict.fromkeys(TUNING))
    return args


def changed(args: Namespace, changes: dict[str, Any]) -> Namespace:
    assert changes.keys() <= vars(args).keys(), "no such argument"
    result = copy.deepcopy(args)
    vars(result).update(changes)
    return result


def test_every_row_has_a_case() -> None:
    names = [refusal.name for refusal in REFUSALS]
    assert len(set(names)) == len(names)
    assert sorted(CASES) == sorted(names)


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, cases in CASES.items() for changes in cases],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_row_refuses_its_cases(tiny: Namespace, name: str, changes: dict[str, Any]) -> None:
    args = changed(tiny, changes)
    row = next(refusal for refusal in REFUSALS if refusal.name == name)
    with pytest.raises(UsageError) as refused:
        validate(args)
    message = str(refused.value)
    assert message == row.told(args)
    assert "\n" not in message


@pytest.mark.parametrize("name", CASES)
def test_a_row_names_its_flags_and_a_way_out(tiny: Namespace, name: str) -> None:
    row = next(refusal for refusal in REFUSALS if refusal.name == name)
    flags = re.findall(r"--(?:no-)?[a-z][a-z-]+", row.message)
    assert flags, "the message names no flag"
    ways_out = ("use ", "leave ", "start ", "give ", "change ", "divide", "need", "at least")
    assert any(way in row.message for way in ways_out)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_fits_is_accepted(tiny: Namespace, case: str) -> None:
    validate(changed(tiny, ACCEPTED[case]))
