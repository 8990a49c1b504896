"""Checkpoints that belong to the model: pieces of global tensors, loadable under any layout."""

from megamoe.checkpoint.load import LoadedModel, load_model
from megamoe.checkpoint.store import checkpoints_of, newest_checkpoint

__all__ = ["LoadedModel", "checkpoints_of", "load_model", "newest_checkpoint"]
