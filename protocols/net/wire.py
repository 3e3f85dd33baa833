"""Tensors on a link: `party.Wire` over `channel.Link`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from protocols.net.link import Link


class TensorWire:
    """Sends and receives int64 tensors.

    Args:
        link: connection to the other computing party.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        """Send a tensor and return the peer's of the same shape: one round."""
        return torch.from_numpy(self._link.exchange(kind, tensor.numpy()))

    def send(self, kind: str, tensor: Tensor) -> None:
        """Send a tensor; a small one may wait for the next one, or until this party waits."""
        self._link.send_array(kind, tensor.numpy(), hold=True)

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Return the peer's int64 tensor of `shape`."""
        return torch.from_numpy(self._link.recv_array(kind, shape))
