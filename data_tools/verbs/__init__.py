"""Do the work of the verbs of `megamoe data`, one file per verb; `stats` is in ``data_tools.stats``, `tokenizer` in
``megamoe.data.sample``.
"""
