"""MegaMoE: distributed training of sparse mixture-of-experts vision-language models from tar shards."""

__version__ = "0.1.0"
