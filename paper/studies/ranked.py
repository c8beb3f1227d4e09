"""Ranks for the studies: the setting's model, and the pairs of its task or of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from austeer.pairs import Pair
from austeer.ranks import AURanks
from experiments import run_cell as cells
from experiments.setting import Setting, load
from MFU_screening import screen


def pairs_of(setting: Setting, task: str) -> list[Pair]:
    return load(replace(setting, task=task))[2].pairs


def ranked(
    setting: Setting, momentum: str, sites: Sequence[str], progress: bool, task: str | None = None
) -> dict[str, AURanks]:
    """By site. The model is always that of the setting: of embedded ones every task has its own."""
    if task in (None, setting.task):  # the tables' own ranks, where they were made
        stored = {site: cells.stored_ranks(setting, momentum, site) for site in sites}
        if all(ranks is not None for ranks in stored.values()):
            return stored
    model, tokenizer, _ = load(setting)
    pairs = pairs_of(setting, task or setting.task)
    return screen(pairs, model, tokenizer, sites, momentum=momentum, protocol=setting.protocol, progress=progress)
