"""Seeded trials of training under faults: planned, run, judged and reported."""
