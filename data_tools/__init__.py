"""Build, check and maintain shards: the work behind the verbs of `megamoe data`.

``verbs`` has one file per verb. ``sources`` reads what shards are built from, ``checks`` judges samples and damaged tars,
``similar`` finds duplicates, ``scenes`` draws pictures with known captions, and ``stats`` describes shards. ``writing``
writes shards with an account of every sample, and ``distribute`` runs one function over many shards, on this machine or
on a cluster. The command line is in ``megamoe.commands.data``.
"""
