"""Which pictures are equal or look alike."""
