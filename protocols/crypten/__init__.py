"""CrypTen behind one door, its operators with the dealer's randomness, and programs that use it by hand."""
