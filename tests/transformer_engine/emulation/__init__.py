"""Transformer Engine's compiled functions in plain torch, so that its Python modules run on a CPU.

Transformer Engine is three things: modules in Python, an extension `transformer_engine_torch` that
they call, and the kernels behind that. The modules are what this project builds its layers from,
and where names, dtypes, shapes, windows, documents and gradients can go wrong; they run here as
they are. The extension is replaced, a function at a time, by the arithmetic that it stands for:
sums in fp32, rounded once at the end. So this proves how the layers are wired, and says nothing
about kernels or speed.

`install.install_emulation()` puts it in place. A function without an emulation raises when called.
"""
