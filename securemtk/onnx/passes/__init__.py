"""What makes a program smaller before it runs; no pass changes what it computes."""
