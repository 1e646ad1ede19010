"""What only a GPU can show, measured and held to bounds: `bash tests/run_gpu.sh`.

A file a subject in `subjects/`; each runs in a process of its own, on a GPU or, at toy size, on a
CPU with the stand-ins that the other tests have.
"""
