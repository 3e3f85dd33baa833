"""How comparison keys lie in memory: what the plain and the compiled functions must agree on."""

# The tree ends this many levels early: one block of 128 bits holds the last values.
LEAF_BITS = 7
# Comparisons that are walked together; keys lie in blocks of so many.
LANES = 8
# Low word of a seed: its two low bits are the control bit and the value bit of a child.
SEED_MASK = 0xFFFF_FFFF_FFFF_FFFC
