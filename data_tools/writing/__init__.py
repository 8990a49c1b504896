"""Read whole samples and write shards of them, with an account of every sample.

``records`` reads and writes samples with all their members; ``lazy_writer`` creates a shard with its first sample.
``account`` counts samples as kept, dropped or lost, and ``out_folder`` keeps the accounts so that a killed verb resumes.
``shuffle`` and ``spans`` serve `reshard`; ``build_shard`` and ``picture`` serve `build`.
"""
