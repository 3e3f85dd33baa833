"""Examples, run as `python -m examples.<name>` from the root. CrypTen installs such a package too; this one wins."""
