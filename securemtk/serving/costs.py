"""What a prediction cost, as the user saw it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from protocols.running.runner import LayerCost


@dataclass
class PredictionCost:
    """What one prediction cost.

    Args:
        online_s: seconds from the first message that depends on the input to the revealed scores.
        offline_s: seconds spent before, on agreeing what is run and on waiting for correlations; where they were
            ordered ahead, next to none.
        waiting_s: of online_s, seconds in which the user's process waited for the keeper.
        online_bytes, offline_bytes: bytes of frames sent by all roles together, without TLS records.
        rounds: messages or simultaneous exchanges that had to wait for the one before, reveal included.
        layers: the same by layer, as the user's process saw it (seconds include waiting for the keeper).
    """

    online_s: float = 0.0
    offline_s: float = 0.0
    waiting_s: float = 0.0
    online_bytes: int = 0
    offline_bytes: int = 0
    rounds: int = 0
    layers: list[LayerCost] = field(default_factory=list)

    def add(self, other: "PredictionCost") -> None:
        """Add the cost of another chunk of the same prediction."""
        for name in ("online_s", "offline_s", "waiting_s", "online_bytes", "offline_bytes", "rounds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if not self.layers:
            self.layers = other.layers
            return
        self.layers = [
            LayerCost(a.name, a.op, a.seconds + b.seconds, a.bytes + b.bytes, a.rounds + b.rounds)
            for a, b in zip(self.layers, other.layers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"online {self.online_s:.3f} s, {self.online_bytes / 1e6:.2f} MB, {self.rounds} rounds; "
            f"offline {self.offline_s:.3f} s, {self.offline_bytes / 1e6:.2f} MB"
        )
