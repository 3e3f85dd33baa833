"""What numbers a prediction can hold: bits of the ring, of fractions, of weights and of comparisons.

Imports no other module, so that whoever only checks a setting loads nothing else. Source: docs/protocols.md#notation.
"""

# Shares are integers modulo 2**RING_BITS; a value x stands as round(x * 2**FRAC_BITS).
RING_BITS = 64
FRAC_BITS = 16
# A product of two encoded values must stay below 2**62 for the truncation to be exact.
LIMIT_BITS = RING_BITS - 2
# A result keeps at most so many fraction bits: its integer part must have room below 2**62.
MOST_FRAC_BITS = 3 * FRAC_BITS
# Fraction bits of the weight of a linear layer.
FEWEST_WEIGHT_BITS, MOST_WEIGHT_BITS = FRAC_BITS, 30

# Comparisons work on k bits, 32 unless told otherwise: padding of a maximum is -2**(k - 2), and values stay below that
# in magnitude. Keys are made for as few and as many.
COMPARISON_BITS, FEWEST_COMPARISON_BITS, MOST_COMPARISON_BITS = 32, 20, 40
# Values that comparisons on 32 bits decide; beyond, the tails of functions need not hold.
WIDEST = 2.0 ** (COMPARISON_BITS - 1 - FRAC_BITS)
# Bits that a comparison may cut off on its way, if any: those of one factor, and at a ReLU up to those of two.
FEWEST_CUT_BITS, MOST_CUT_BITS = FRAC_BITS, 32


def input_limit(comparison_bits: int = COMPARISON_BITS) -> float:
    """Return the largest magnitude of an input, so that differences of two values can still be compared."""
    return 2.0 ** (comparison_bits - 2 - FRAC_BITS)


def most_cut(comparison_bits: int) -> int:
    """Return the most bits that a ReLU on k bits may cut: what it then compares must lie inside the ring."""
    return min(MOST_CUT_BITS, RING_BITS - comparison_bits)
