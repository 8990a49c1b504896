"""Offer the order of samples to other training loops, as a PyTorch data set that webdataset's stages can follow.

``dataset`` holds :class:`.ShardDataset`, ``arguments`` checks what its caller passes, ``dataset_position`` computes how far
it has come for any number of ranks and workers, and ``pipeline`` keeps that state behind webdataset's stages.
"""
