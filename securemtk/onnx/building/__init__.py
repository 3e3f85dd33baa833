"""What the rules for operators are built with."""
