"""Drawn pictures with known truth."""
