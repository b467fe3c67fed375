"""Operators that act on a whole batch in which every token has its own program. Imports torch and triton only.

No `__version__` here: Hugging Face distributes a package of the same name, which transformers knows by its version.
"""

from __future__ import annotations

from kernels.feedback import feedback_, plain_feedback_
from kernels.mask import mask_
from kernels.sparse import sparsify_
from kernels.sparse_linear import sparse_linear
from kernels.turn import turn_

__all__ = ["feedback_", "mask_", "plain_feedback_", "sparse_linear", "sparsify_", "turn_"]
