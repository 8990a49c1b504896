"""From bytes to a packed sequence: decoding, tokens, packing."""
