"""Define the command line of `megamoe data`: arguments, options and printed output, one file per verb.

``group`` collects the verbs, ``options`` holds the options that several verbs share, and ``outcome`` prints what a verb
did with each sample. The work itself is in :mod:`data_tools.verbs`. Slow imports are inside the commands, so that
``--help`` answers at once.
"""
