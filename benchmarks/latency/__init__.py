"""How long encrypted predictions take, beside CrypTen and SPU, and over other networks."""
