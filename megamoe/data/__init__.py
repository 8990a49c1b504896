"""Data plane: shard index -> order -> storage -> decode -> pack -> loader.

``shards`` turns names into files, ``index`` knows where each sample lies in its tar, ``order`` says which sample comes
when, ``storage`` brings its bytes, ``decode`` and ``tokenizer`` make pixels and ids of them, ``pack`` and ``lane`` lay
them into sequences, and ``loader`` hands a rank its part of each optimizer step. ``samples`` reads shards front to back
for evaluation. Nothing here imports DeepSpeed: these modules are loaded by every decoding process.
"""
