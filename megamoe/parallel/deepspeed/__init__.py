"""All that knows DeepSpeed: its engines, expert-parallel groups, and where it keeps main parameters."""
