"""Bytes of live tensors inside a block, on any device, as PyTorch's dispatcher sees them.

peak = max over time of the sum of distinct storages that are alive and were made inside the block.
"""

from __future__ import annotations

from typing import Any
from weakref import finalize

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationMeter(TorchDispatchMode):
    """Peak bytes of live tensors made inside its block, as PyTorch's dispatcher sees them on any device.

    Scratch memory inside a fused operation is not seen. Views share their storage and are counted once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._holders: dict[int, tuple[int, int]] = {}  # storage address -> (tensors that hold it, bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                address = leaf.untyped_storage().data_ptr()
                if address in inputs and address not in self._holders:
                    continue  # a view of a weight or of an input from outside
                self._hold(leaf, address)
        return output

    def _hold(self, tensor: Tensor, address: int) -> None:
        count, size = self._holders.get(address, (0, tensor.untyped_storage().nbytes()))
        if count == 0:
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._holders[address] = (count + 1, size)
        finalize(tensor, self._release, address)

    def _release(self, address: int) -> None:
        count, size = self._holders[address]
        if count > 1:
            self._holders[address] = (count - 1, size)
        else:
            del self._holders[address]
            self.live_bytes -= size
