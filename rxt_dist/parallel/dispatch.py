"""Where tokens travel whose experts are spread, as arithmetic without process groups."""

from __future__ import annotations

import math

MOST_VISITS = 0.75
"""If more of the tokens than this have an expert on a rank, all of them are sent there: a third more rows at
most, of which the host knows the number beforehand."""


def visits(num_experts: int, top_k: int, ranks: int) -> float:
    """Share of the tokens that have one of their ``top_k`` experts on a certain rank of ``ranks``, if experts
    are evenly loaded: ``1 - C(E - E / R, K) / C(E, K)``."""
    elsewhere = num_experts - num_experts // ranks
    return 1 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)


def all_travel(num_experts: int, top_k: int, ranks: int) -> bool:
    """Whether every token is sent to every rank."""
    return visits(num_experts, top_k, ranks) > MOST_VISITS


def travelling(num_experts: int, top_k: int, ranks: int) -> float:
    """Share of the tokens that are sent to a certain other rank."""
    return 1.0 if all_travel(num_experts, top_k, ranks) else visits(num_experts, top_k, ranks)
