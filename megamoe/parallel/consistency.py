"""Whether what must be equal on several ranks is: so that a flipped bit on one of them is found, and named.

Replicas of a parameter get the same gradients and the same update, bit for bit, so their bits may be compared: dense
parameters over the data-parallel ranks of a stage, those of experts over the ranks that hold the same experts. Under
ZeRO-3 no rank holds a replica. ZeRO hands the weights out anew in each step, from the one rank that owns their fp32
master: what went wrong since the last step is found, and what went wrong on the way. A fault in the master itself is found
by its owner, see :mod:`megamoe.parallel.deepspeed.main_parameter_sums`.

Counters are sums over all ranks, and nothing in training draws from the generators of torch, or it would depend on the
layout: both are equal on all ranks. A lane of the data is in the hands of one rank only, but where all lanes together must
stand is known: there are the samples that all steps have taken.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.core.errors import DisagreementError
from megamoe.data.order.position import DataState
from megamoe.model.parameter import info_of
from megamoe.parallel.layout import Layout

_AS_INTEGERS = {2: torch.int16, 4: torch.int32}


class _Claim(NamedTuple):
    """What a rank says of itself; hashes of the counters, the state of the generators and the shards set aside; sums over
    the bits of its parameters."""

    step: int
    counters: int
    generators: int
    quarantine: int
    position: int
    masters_changed: int
    dense: int
    experts: int


def check_agreement(
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    step: int,
    counters: Sequence[object],
    drawn: int,
    data: DataState | None,
    masters_changed: bool,
    device: torch.device,
) -> None:
    """Compare over all ranks. All ranks call.

    Args:
        layout: the layout of all ranks.
        parameters: global name -> this rank's part.
        step: steps done.
        counters: what all ranks count alike.
        drawn: samples that all steps have taken from the lanes of the data.
        data: where this rank's lanes stand; None for a rank that loads no data.
        masters_changed: whether this rank's fp32 masters or moments have changed outside of an update.
        device: where collectives take place.

    Raises:
        DisagreementError: on all ranks alike; names the ranks that differ from the others, and in what.
    """
    dense = experts = 0
    if layout.zero < 3:
        for name, parameter in parameters.items():
            weight = zlib.crc32(name.encode())  # parameters that trade places are found as well
            if info_of(parameter).is_expert:
                experts += weight * _bit_sum(parameter.data)
            else:
                dense += weight * _bit_sum(parameter.data)
    claim = _Claim(
        step,
        zlib.crc32(repr(counters).encode()),
        _generators(device),
        -1 if data is None else zlib.crc32(repr(sorted(data.quarantine.items())).encode()),
        0 if data is None else sum(data.cursors.values()),
        int(masters_changed),
        dense % 2**62,
        experts % 2**62,
    )
    mine = torch.tensor(claim, dtype=torch.int64, device=device)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    claims = [_Claim(*claim.tolist()) for claim in everyone]
    wrong = (
        _odd_ones_out("step", {rank: ((), claim.step) for rank, claim in enumerate(claims)})
        + _odd_ones_out("counters", {rank: ((), claim.counters) for rank, claim in enumerate(claims)})
        + _odd_ones_out("random generators", {rank: ((), claim.generators) for rank, claim in enumerate(claims)})
        + _odd_ones_out("shards set aside", {r: ((), c.quarantine) for r, c in enumerate(claims) if c.quarantine >= 0})
        + _odd_ones_out("dense parameters", {r: ((layout.stage(r),), c.dense) for r, c in enumerate(claims)})
        + _odd_ones_out("experts", {r: ((layout.stage(r), layout.expert_rank(r)), c.experts) for r, c in enumerate(claims)})
    )
    found = [f"ranks disagree that must be equal: {'; '.join(wrong)}"] if wrong else []
    if changed := [str(rank) for rank, claim in enumerate(claims) if claim.masters_changed]:
        found.append(f"master weights or moments of rank {', '.join(changed)} have changed between two updates")
    if (position := sum(claim.position for claim in claims)) != drawn:
        found.append(f"data position: the lanes stand at {position} samples in all, but the steps have taken {drawn}")
    if found:
        raise DisagreementError(
            f"step {step}: {'; '.join(found)}; a fault of memory or of the network is likely, look at the machines "
            "of these ranks"
        )


def _odd_ones_out(what: str, claims: Mapping[int, tuple[tuple[int, ...], int]]) -> list[str]:
    """Ranks whose value is not that of the most of their group, by (group, value); of two, both are named."""
    groups: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for rank, (group, value) in claims.items():
        groups[group][rank] = value
    found = []
    for members in groups.values():
        (usual, count), *_ = Counter(members.values()).most_common()
        odd = [rank for rank, value in members.items() if value != usual]
        if odd:
            named = odd if count > len(members) / 2 else list(members)
            found.append(f"{what} of rank {', '.join(map(str, named))} (of ranks {', '.join(map(str, members))})")
    return found


def _generators(device: torch.device) -> int:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return zlib.crc32(b"".join(state.numpy().tobytes() for state in states))


def _bit_sum(tensor: Tensor) -> int:
    """The bits of all elements, added up as integers."""
    return int(tensor.detach().contiguous().view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
