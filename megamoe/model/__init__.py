"""Architecture only: vision encoder, projector, decoder, sparse blocks, and the model as a list of layers.

Letters for dimensions, used as suffixes of tensors throughout (``scores_TK``):

B sequences of a micro-batch · L tokens of a packed sequence · I picture slots of a sequence · P patches of a picture ·
S tokens of a tower's sequence (L in the decoder, I*P in the encoder) · T = B*S tokens · D width · H heads · G key/value
heads · d head width · E experts of a block · e experts held here · K experts per token · N routed rows · F hidden width ·
V vocabulary.
"""
