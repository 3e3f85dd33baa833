"""A CrypTen program on securemtk's protocols by one call, and what that brings.

    python -m examples.crypten_user

`predict` is what a CrypTen user has written: it knows nothing of securemtk. `run` is the one call. The second run is
the same program with CrypTen's own operations, its comparison circuits among them, over the same links and dealer.
"""

# First of all: CrypTen 0.4.1 does not import on current torch by itself.
from securemtk.crypten_backend import run  # isort: skip

import statistics
import time

import crypten
import torch
from torch import Tensor

BATCH, REPEATS, WARMUP = 4, 10, 3
PAUSE_S = 0.5  # between two predictions, as between two requests of a user


class Net(torch.nn.Module):
    """A small CNN for images of 16x16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = torch.nn.Linear(256, 32), torch.nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (n, 10) of images (n, 1, 16, 16)."""
        x = torch.nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = torch.nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        scores: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return scores


def plain_net() -> Net:
    """Return the network with the same weights on every call; in earnest, party 0 alone reads them from a file."""
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    """Return the same images on every call; in earnest, party 1 alone reads them."""
    return torch.randn(BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(1))


# --- what the CrypTen user has --------------------------------------------------------------------------------------


def predict(repeats: int, pause_s: float) -> dict[str, object]:
    """Convert, encrypt, predict; return the scores, the best classes and the seconds of each prediction."""
    crypten.init()
    model = crypten.nn.from_pytorch(plain_net(), torch.empty(1, 1, 16, 16)).encrypt(src=0)
    secret = crypten.cryptensor(images(), src=1)
    seconds = []
    with crypten.no_grad():
        for _ in range(WARMUP + repeats):
            time.sleep(pause_s)
            start = time.perf_counter()
            scores = model(secret)
            revealed = scores.get_plain_text()
            seconds.append(time.perf_counter() - start)
        best = scores.argmax(dim=1, one_hot=False).get_plain_text()
        relu = []
        wide = crypten.cryptensor(torch.randn(10_000), src=1)
        for _ in range(WARMUP + repeats):
            time.sleep(pause_s)
            start = time.perf_counter()
            wide.relu()
            relu.append(time.perf_counter() - start)
    return {"scores": revealed, "best": best, "model_s": seconds[WARMUP:], "relu_s": relu[WARMUP:]}


# --- what is new ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run it on both kinds of protocols, beside plain torch."""
    with torch.no_grad():
        expected = plain_net()(images())
    for protocol, name in (("fss", "securemtk"), ("crypten", "CrypTen's own")):
        for pause_s, when in ((PAUSE_S, f"every {PAUSE_S} s"), (0.0, "back to back")):
            # Without protocol=..., a user gets the first of the two.
            result = run(predict, REPEATS, pause_s, protocol=protocol)[1]
            difference = (result["scores"] - expected).abs().max().item()
            if difference > 0.01 or not torch.equal(result["best"], expected.argmax(dim=1)):
                raise SystemExit(f"{name}: the result must be that of torch; it differs by {difference}")
            model_ms, relu_ms = (1000 * statistics.median(result[key]) for key in ("model_s", "relu_s"))
            print(
                f"{name:>13}, {when:>12}: CNN at batch {BATCH} {model_ms:7.1f} ms, ReLU of 10000 {relu_ms:7.1f} ms, "
                f"largest difference from torch {difference:.1e}"
            )


if __name__ == "__main__":
    main()
