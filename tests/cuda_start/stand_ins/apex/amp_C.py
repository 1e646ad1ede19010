from tests.cuda_start.stand_ins.kernels_in_torch import multi_tensor_l2norm, multi_tensor_scale

__all__ = ["multi_tensor_l2norm", "multi_tensor_scale"]
