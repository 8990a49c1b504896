"""Measurements that anyone can repeat by a command, run from a checkout: ``python -m benchmarks.NAME``.

This package is not installed, because fairscale's wheel installs a package of the same name. What `megamoe bench` runs, and
helpers that both use, are in :mod:`megamoe.bench`.
"""
