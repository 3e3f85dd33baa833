"""Programs as CrypTen's users write them, which tests run at two parties."""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protocols.crypten import door

crypten = door.crypten


def operations(x: Tensor, y: Tensor, image: Tensor, kernel: Tensor) -> dict[str, Any]:
    """Apply many operations and return the type of the tensors and all results, revealed."""
    crypten.init()
    a, b = crypten.cryptensor(x, src=0), crypten.cryptensor(y, src=1)
    picture, weights = crypten.cryptensor(image, src=1), crypten.cryptensor(kernel, src=0)
    best, place = a.max(dim=1)
    changed = b.clone()
    before = a.matmul(changed)
    changed += 1
    secret = {
        "sum": a + b,
        "product": a * b,
        "matmul": a.matmul(b.t()),
        "matmul with the same again": (a + 1).matmul(b.t()),
        "matmul by a public one": a.matmul(y),
        "matmul before a change": before,
        "matmul after a change in place": a.matmul(changed),
        "conv": picture.conv2d(weights, stride=2, padding=1),
        "conv by a public one": picture.conv2d(kernel, padding=(0, 1)),
        "relu": a.relu(),
        "abs": a.abs(),
        "less": a < b,
        "at least": a >= b,
        "equal": a == crypten.cryptensor(x, src=1),
        "unequal": a != b,
        "maximum": best,
        "its place": place,
        "minimum": a.min(dim=1, one_hot=False)[0],
        "maximum of all": a.max(),
        "index": a.argmax(dim=0, one_hot=False),
        "index among all": a.argmax(one_hot=False),
        "pool": picture.max_pool2d(2),
        "padded pool": picture.max_pool2d(3, stride=2, padding=1),
        "dilated pool": picture.max_pool2d(2, dilation=2),
        "hardtanh": a.hardtanh(-0.5, 0.5),
        "softmax": a.softmax(1),
        "where": crypten.where(a < b, a, b),
        "stack": crypten.stack([a, b]).relu(),
        "mean": a.mean(dim=1),
        "whole multiple": a * 2.0,
    }
    for _ in range(8):
        a.relu()
    ahead = door.current().correlations._supply._ready
    while not ahead:  # the dealer deals more of the same
        time.sleep(0.01)
    secret["after a wrong guess"] = a[:2].relu()
    revealed = {name: value.get_plain_text() for name, value in secret.items()}
    crypten.uninit()
    return {"type": type(a).__name__, "revealed": revealed, "epoch": door.current().correlations._epoch}


class Net(torch.nn.Module):
    """A small CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.first, self.last = torch.nn.Linear(64, 16), torch.nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (n, 5) of x (n, 1, 8, 8)."""
        x = torch.nn.functional.max_pool2d(self.conv(x).relu(), 2)
        scores: Tensor = self.last(self.first(x.flatten(1)).relu())
        return scores


def plain_net() -> Net:
    """Return the network with the same weights on every call."""
    torch.manual_seed(0)
    return Net().eval()


@crypten.mpc.run_multiprocess(world_size=2)
def converted_model(x: Tensor) -> list[Tensor]:
    """Convert a torch model as CrypTen does, predict twice, and train for one step."""
    model = crypten.nn.from_pytorch(plain_net(), torch.empty(1, 1, 8, 8)).encrypt(src=0)
    secret = crypten.cryptensor(x, src=1)
    scores = [model(secret).get_plain_text() for _ in range(2)]
    model.train()
    loss = crypten.nn.MSELoss()(model(secret), crypten.cryptensor(torch.ones(len(x), 5), src=1))
    model.zero_grad()
    loss.backward()
    model.update_parameters(0.1)
    model.eval()
    return [*scores, model(secret).get_plain_text()]


def relu_type(x: Tensor) -> tuple[str, Tensor]:
    """Return the tensor type's name, and the ReLU."""
    y = crypten.cryptensor(x, src=1).relu()
    return type(y).__name__, y.get_plain_text()


def busy(seconds: float) -> Tensor:
    """Compute in one call that holds the interpreter's lock at rank 1, while rank 0 waits for its share."""
    x = crypten.cryptensor(torch.tensor([-2.0, 3.0]), src=0)
    if crypten.communicator.get().get_rank() == 1:
        ctypes.PyDLL(None).usleep(int(1e6 * seconds))
    revealed: Tensor = x.relu().get_plain_text()
    return revealed


# --- programs that fail ---------------------------------------------------------------------------------------------


def other_shapes() -> None:
    """Compare three values at rank 0, two at rank 1."""
    rank = crypten.communicator.get().get_rank()
    crypten.cryptensor(torch.zeros(3 - rank), src=rank).relu()


def other_steps() -> None:
    """Reveal at rank 0 where rank 1 multiplies."""
    x = crypten.cryptensor(torch.ones(2), src=0)
    if crypten.communicator.get().get_rank() == 0:
        x.get_plain_text()
    else:
        x.square()


def earlier_end() -> None:
    """End at rank 0 where rank 1 compares."""
    x = crypten.cryptensor(torch.ones(2), src=0)
    if crypten.communicator.get().get_rank() == 1:
        x.relu()


def error_with_a_value() -> None:
    """Raise an error whose text holds a value."""
    raise ValueError("the secret is 42")


def forever(folder: str) -> None:
    """Compute for a second, write the process's id to a file, and compute until the end of days."""
    party = crypten.communicator.get()
    x = crypten.cryptensor(torch.ones(4), src=0)
    for _ in range(100):
        x.relu()
        time.sleep(0.01)
    part = Path(folder) / f"{party.get_rank()}.part"
    part.write_text(str(os.getpid()))
    part.rename(part.with_suffix(".pid"))
    while True:
        x.relu()
        time.sleep(0.01)
