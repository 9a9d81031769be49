"""Which weights go and what the others become: one solver a file."""
