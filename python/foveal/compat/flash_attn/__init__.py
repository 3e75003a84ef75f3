"""The functions of the flash-attn package (version 2) by foveal: a model written for them runs on the CPU unchanged.

``foveal.compat.flash_attn.flash_attn_func`` and its relatives have the names, argument order, defaults, layouts and
bottom-right causal alignment of the originals (Dao 2023, "FlashAttention-2"). :func:`install` makes
``import flash_attn`` find them where flash-attn is not installed.

Where they differ: all four floating dtypes are accepted, head dims up to 512, pages of any size, and keys that no query
sees have no influence at all; a query that sees no key has the log-sum-exp -inf; ``deterministic`` is always so, and
``num_splits`` has no effect.
"""

from foveal.compat.flash_attn import bert_padding as bert_padding
from foveal.compat.flash_attn._install import install
from foveal.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# The interface that is offered: programs compare it to know which arguments there are.
__version__ = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]
