"""Turn the bytes of a sample into pixels and token ids, and pack samples into sequences.

``decode`` reads pictures and captions and detects damage, ``tokenizer`` maps text to ids, ``vocabulary`` trains such a
tokenizer from captions, and ``pack`` lays samples into a sequence of constant length.
"""
