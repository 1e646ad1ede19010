"""The CPU platform: what lets megatron-core run on a machine without CUDA.

Nothing here is installed where CUDA works. `torch.cuda.is_available()` is left as it is (False),
so that torch and other libraries in the process keep choosing their CPU paths.
"""
