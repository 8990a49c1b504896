"""`megamoe bench`: figures of this system beside those of its peers, measured in one run on this machine.

Further measurements, which need a checkout, are in the top-level folder ``benchmarks``.
"""
