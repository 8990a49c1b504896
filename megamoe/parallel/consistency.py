"""Check that ranks agree where they must, so that a flipped bit on one of them is found and the rank named.

Replicas of a parameter get the same gradients and the same update, bit for bit, so their bits can be compared: dense
parameters over the data-parallel ranks of a stage, expert parameters over the ranks that hold the same experts. Under
ZeRO-3 no rank holds a replica. Under ZeRO-1 and 2 each step distributes the weights anew from the rank that owns their
main parameters (fp32); comparing replicas finds faults since the last step and faults on the way. A fault in the main
parameters themselves is found by their owner, see :mod:`megamoe.parallel.deepspeed.main_parameter_sums`.

Counters are sums over all ranks. Nothing in training draws from torch's generators, since that would make it depend on the
layout. So both are equal on all ranks. Each lane of the data belongs to one rank, but the sum of all positions is known:
the number of samples that all steps have taken.
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
    """What a rank reports: hashes of its counters, generators and quarantine; bit sums of its parameters."""

    step: int
    counters: int
    generators: int
    quarantine: int
    position: int
    main_parameters_changed: int
    dense: int
    experts: int


def check_agreement(
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    step: int,
    counters: Sequence[object],
    drawn: int,
    data: DataState | None,
    main_parameters_changed: bool,
    device: torch.device,
) -> None:
    """Compare the state of all ranks. All ranks call.

    Args:
        layout: The layout of all ranks.
        parameters: Global name -> this rank's part.
        step: Steps done.
        counters: Counters that are equal on all ranks.
        drawn: Samples that all steps have taken from the lanes of the data.
        data: Position of this rank's lanes; None for a rank that loads no data.
        main_parameters_changed: Whether this rank's main parameters or moments changed outside of an update.
        device: Device of the collectives.

    Raises:
        DisagreementError: on all ranks alike; names the ranks that differ, and in what.
    """
    dense = experts = 0
    if layout.zero < 3:
        for name, parameter in parameters.items():
            weight = zlib.crc32(name.encode())  # also finds parameters that trade places
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
        int(main_parameters_changed),
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
        + _odd_ones_out("quarantined shards", {r: ((), c.quarantine) for r, c in enumerate(claims) if c.quarantine >= 0})
        + _odd_ones_out("dense parameters", {r: ((layout.stage(r),), c.dense) for r, c in enumerate(claims)})
        + _odd_ones_out("experts", {r: ((layout.stage(r), layout.expert_rank(r)), c.experts) for r, c in enumerate(claims)})
    )
    found = [f"ranks disagree that must be equal: {'; '.join(wrong)}"] if wrong else []
    if changed := [str(rank) for rank, claim in enumerate(claims) if claim.main_parameters_changed]:
        found.append(f"main parameters or moments of rank {', '.join(changed)} changed between two updates")
    if (position := sum(claim.position for claim in claims)) != drawn:
        found.append(f"data position: the lanes stand at {position} samples in all, but the steps have taken {drawn}")
    if found:
        raise DisagreementError(
            f"step {step}: {'; '.join(found)}; a fault of memory or of the network is likely, look at the machines "
            "of these ranks"
        )


def _odd_ones_out(what: str, claims: Mapping[int, tuple[tuple[int, ...], int]]) -> list[str]:
    """Return the ranks that differ from their group's majority. Without a majority, as between two, name the whole group.

    Args:
        what: What is compared, for the message.
        claims: rank -> (group, value).
    """
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
    """Sum the bits of all elements as integers."""
    return int(tensor.detach().contiguous().view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
