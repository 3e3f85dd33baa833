"""A training run on the disk: its folder, and its release as a bundle."""
