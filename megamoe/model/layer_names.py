"""Names of the model's layers. Without torch, so that a launcher can check a layout at once."""

from __future__ import annotations

from megamoe.config import ModelConfig


def layer_names(model: ModelConfig) -> dict[str, bool]:
    """Name all layers in order, and say which have experts."""
    names = {"vision.embed": False}
    names |= {f"vision.blocks.{i}": model.vision.is_sparse(i) for i in range(model.vision.depth)}
    names["merge"] = False
    names |= {f"decoder.blocks.{i}": model.decoder.is_sparse(i) for i in range(model.decoder.depth)}
    names["head"] = False
    return names
