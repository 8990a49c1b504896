"""Decide which sample comes when, and record how far a run has come in that order.

``sample_order`` maps (lane, number) to (source, epoch, shard, sample) by arithmetic alone. ``position`` is what a
checkpoint keeps of it: the next number of each lane, and the anchors from which the arithmetic can restart.
"""
