"""Write RUN/memory.json: for each rank the predicted and the measured peak of memory."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from megamoe.config import Config
from megamoe.core.run_folder import RunFolder
from megamoe.parallel.layout import Layout
from megamoe.parallel.memory import peak_memory, predict_memory


def write_memory_report(config: Config, layout: Layout, device: torch.device) -> None:
    """Gather the peaks of all ranks, in bytes, and write them on rank 0. All ranks call."""
    rank = dist.get_rank()
    predicted = predict_memory(config, layout, layout.stage(rank))
    mine = torch.tensor([predicted.on(device), peak_memory(device)], dtype=torch.int64, device=device)
    everyone = [torch.zeros_like(mine) for _ in range(layout.world_size)]
    dist.all_gather(everyone, mine)
    if rank == 0:
        rows = [{"rank": rank, "predicted": p, "peak": m} for rank, (p, m) in enumerate(t.tolist() for t in everyone)]
        RunFolder(config.run.folder).memory.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
