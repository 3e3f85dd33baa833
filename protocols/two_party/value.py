"""A value of a running program: one party's share, and the scale it has just now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from protocols.limits import FRAC_BITS
from protocols.two_party.party import Party, truncate


@dataclass
class Value:
    """A share and its scale; `truncate_to_scale` changes it in place, so that two users pay once.

    Args:
        share: int64.
        frac_bits: fraction bits; 0 for truth values and indices, 2 f behind a product, more inside smooth functions.
    """

    share: Tensor
    frac_bits: int = FRAC_BITS

    def truncate_to_scale(self, party: Party) -> Tensor:
        """Return the share at scale 2**FRAC_BITS: 1 round if it has to be truncated."""
        return self.truncate_to(party, FRAC_BITS).raised_to(FRAC_BITS)

    def truncate_to(self, party: Party, frac_bits: int) -> "Value":
        """Truncate to `frac_bits` where there are more, in place: 1 round if so."""
        if self.frac_bits > frac_bits:
            self.share = truncate(party, self.share, self.frac_bits - frac_bits)
            self.frac_bits = frac_bits
        return self

    def raised_to(self, frac_bits: int) -> Tensor:
        """Return the share with at least its own fraction bits; exact, no round."""
        return self.share << (frac_bits - self.frac_bits) if frac_bits > self.frac_bits else self.share


Weights = Mapping[str, Tensor]
Operator = Callable[..., Value]


def public(value: float, frac_bits: int) -> int:
    """Return a public number at a scale."""
    return round(value * 2.0**frac_bits)
