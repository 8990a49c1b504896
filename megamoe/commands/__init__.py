"""Verbs of the command line that come in groups; heavy imports are inside the verbs."""
