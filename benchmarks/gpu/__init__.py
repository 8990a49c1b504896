"""Measure what holds on one GPU: parity, kernels, speed, memory, checkpoints, faults, in one call of eight minutes.

``python -m benchmarks.gpu --out DIR`` runs everything; docs/benchmarks.md tells how on a bare machine. A part is a module
with ``measure(context)`` and runs in a process of its own; ``parts.py`` lists them.
"""
