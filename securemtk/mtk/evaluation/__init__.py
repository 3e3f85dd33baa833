"""What a trained model answers with and without keys, and what its answers leak."""
