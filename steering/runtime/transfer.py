"""Between host and device without waiting: small arrays there, a step's results back.

A copy from pageable memory, or one that blocks, makes the host wait for all that runs on the device. So what goes there
is page-locked first (torch's allocator hands such memory out again only when the copy is done), and what comes back is
asked for at once and waited for when it is needed. On a CPU both are nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Host = Sequence[Any] | np.ndarray | Tensor
"""Numbers of the host."""


def upload(values: Host, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on a device, in stream order. On a CPU an array is shared, not copied."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu" or not host.numel():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host, in the state that they have in stream order when this is made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> list[Tensor]:
        """The tensors, when they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


NOTHING = Download(())
"""For who has nothing to wait for."""
