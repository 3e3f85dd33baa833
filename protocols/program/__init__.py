"""What is computed: programs, piecewise functions, and their meaning in the clear."""
