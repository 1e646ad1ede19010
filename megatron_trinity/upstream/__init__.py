"""Every adaptation of megatron-core, in one place.

`adapt_megatron()` is called once by an entry point, before `megatron.training` is imported.
Importing this package changes nothing. See docs/upstream.md.
"""

from megatron_trinity.upstream.adapt import adapt_megatron

__all__ = ["adapt_megatron"]
