"""The ranks of one attempt on this machine: start, watch, stop, and say how they ended."""
