"""Ranks for the studies: those of the tables where they exist, else made on the spot."""

from __future__ import annotations

from collections.abc import Sequence

from austeer.ranks import AURanks
from experiments.bench import Bench
from experiments.ranking import stored_ranks
from MFU_screening import screen

MOMENTA = ("activation", "causal")  # those that the studies compare


def rank_sites(
    bench: Bench, momentum: str, sites: Sequence[str], progress: bool, task: str | None = None
) -> dict[str, AURanks]:
    """Return the ranks of the bench's model by site, on the pairs of its own task or of another."""
    task = task or bench.task_spec.name
    if task == bench.task_spec.name:
        stored = {site: stored_ranks(bench, momentum, site) for site in sites}
        if all(ranks is not None for ranks in stored.values()):
            return stored
    return screen(
        bench.pairs_of(task), bench.model, bench.tokenizer, sites,
        momentum=momentum, protocol=bench.task_spec.protocol, progress=progress,
    )  # fmt: skip


def n_ranking_prompts(momentum: str, n_pairs: int) -> int:
    """Return how many prompts ranking runs: both texts of a pair; a backward pass counts as two forward ones."""
    return 2 * n_pairs * (3 if momentum == "causal" else 1)
