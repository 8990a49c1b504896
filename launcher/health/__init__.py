"""Whether nodes and the links between them are fit for ranks."""
