"""The verbs of `megamoe data`, one per file; imports that take time are inside them."""
