"""Operators that act on a whole batch in which every token has its own program. Imports torch, triton and numba only.

No `__version__` here: Hugging Face distributes a package of the same name, which transformers knows by its version.
"""

from __future__ import annotations

from kernels.attention import paged_attention
from kernels.binding import bind, warm
from kernels.feedback import feedback_
from kernels.mask import mask_
from kernels.norm import bind_norm, norm_
from kernels.sparse import sparsify_
from kernels.sparse_linear import sparse_linear
from kernels.turn import turn_

__all__ = [
    "bind",
    "bind_norm",
    "feedback_",
    "mask_",
    "norm_",
    "paged_attention",
    "sparse_linear",
    "sparsify_",
    "turn_",
    "warm",
]
