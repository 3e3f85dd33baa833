"""The execution of a program: by a party, in the clear, in rehearsal; and what its values may be."""
