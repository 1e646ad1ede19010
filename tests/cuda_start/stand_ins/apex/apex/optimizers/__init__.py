from tests.cuda_start.stand_ins.kernels_in_torch import FusedAdam

FusedSGD = FusedAdam
__all__ = ["FusedAdam", "FusedSGD"]
