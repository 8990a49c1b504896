"""The ranks of one attempt: start them, watch them, stop them, and tell how they ended."""
