"""What the scripts of tools/, benchmarks/ and examples/ share.

They run from anywhere and cannot import each other. Nothing else in the package imports this one,
and importing it imports neither torch nor megatron, so that `--help` answers at once.
"""
