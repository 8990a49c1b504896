"""Checkpoints that belong to the model: pieces of global tensors, loadable under any layout."""

from megamoe.checkpoint.folders import checkpoints_of, newest_checkpoint
from megamoe.checkpoint.reading import LoadedModel, load_model

__all__ = ["LoadedModel", "checkpoints_of", "load_model", "newest_checkpoint"]
