"""Starts the ranks of a run and keeps them going."""
