"""Load a rank's part of each optimizer step, prepared by worker processes.

``step_loader`` is what training iterates over. It starts ``processes``, each of which runs ``worker``: for each of its
lanes, ``lane`` locates the next samples in the order, reads and decodes them, and packs them into a sequence. Pixels and
token ids are written into memory that worker and rank share.
"""
