"""Judge samples and damaged tars.

``contents`` checks the bytes of a member, ``conditions`` is what `filter` asks of a sample (with ``language`` and
``sample_parts``), and `repair` finds the intact parts of a tar by ``salvage`` and decides by ``repair_plan`` what to save.
"""
