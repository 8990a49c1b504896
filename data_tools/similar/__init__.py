"""Find samples with equal or similar pictures.

``fingerprints`` computes what samples are compared by, with ``perceptual`` for similar pictures. ``duplicates`` compares
the fingerprints of a whole set, with ``hamming`` to find hashes that differ in few bits.
"""
