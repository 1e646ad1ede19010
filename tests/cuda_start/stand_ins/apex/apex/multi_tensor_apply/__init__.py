from tests.cuda_start.stand_ins.kernels_in_torch import multi_tensor_applier

__all__ = ["multi_tensor_applier"]
