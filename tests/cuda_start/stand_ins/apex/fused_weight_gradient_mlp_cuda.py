from tests.cuda_start.stand_ins.kernels_in_torch import wgrad_gemm_accum_fp32

wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
__all__ = ["wgrad_gemm_accum_fp16", "wgrad_gemm_accum_fp32"]
