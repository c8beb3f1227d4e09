"""The ranks that methods need: the stored ones where they fit, else made from the bench's pairs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from austeer.code_identity import code_hash
from austeer.identity import fingerprint
from austeer.pairs import pairs_hash
from austeer.ranks import AURanks
from austeer.temperature import FITTED
from experiments.bench import Bench
from MFU_screening import MOMENTA, TEMPERED, group_numbers, screen
from rmodels import code_roots


def make_ranks(bench: Bench, momentum: str, sites: Iterable[str]) -> int:
    """Rank the sites that have no ranks yet, in one pass over the pairs, and store the ranks. Return how many."""
    missing = [site for site in sites if stored_ranks(bench, momentum, site) is None]
    for site, ranks in _screen(bench, momentum, missing).items() if missing else ():
        ranks.save(bench.store.ranks_file(bench.model_spec, bench.task_spec, momentum, site))
    return len(missing)


def ranks_of(bench: Bench, momentum: str, site: str) -> AURanks:
    ranks = stored_ranks(bench, momentum, site)
    return _screen(bench, momentum, [site])[site] if ranks is None else ranks


def stored_ranks(bench: Bench, momentum: str, site: str) -> AURanks | None:
    """Return the stored ranks if they were made from exactly this model, these pairs and this code."""
    file = bench.store.ranks_file(bench.model_spec, bench.task_spec, momentum, site)
    if not file.exists():
        return None
    ranks = AURanks.load(file)
    origin = {
        "code": ranks.header.get("code") and screening_code(bench, momentum),  # shipped ranks have none
        "kernel": ranks.header.get("kernel") and bench.model.config._attn_implementation,  # nor do they name a kernel
        "fingerprint": fingerprint(bench.model),
        "pairs_hash": pairs_hash(bench.task.pairs),
        "momentum": momentum,
        "protocol": bench.task_spec.protocol,
    }
    if momentum == TEMPERED:  # the command that ranks may put others here
        origin |= {"temperature": FITTED, "balanced": None}
    fits = all(ranks.header.get(key) == value for key, value in origin.items())
    if fits and momentum == TEMPERED:  # its folds go by groups, which the hash of the pairs does not tell
        fits = ranks.stats["groups"].tolist() == group_numbers(bench.task.pairs, bench.task.groups)
        fits &= not ranks.lies.any()  # nor do records name the AUs that somebody flagged
    return ranks if fits else None


def screening_code(bench: Bench, momentum: str) -> str:
    return code_hash(*screening_roots(momentum, type(bench.model)), cut={"MFU_screening:MOMENTA"})


def screening_roots(momentum: str, family: type) -> tuple:
    return screen, MOMENTA[momentum], *code_roots(family)


def _screen(bench: Bench, momentum: str, sites: list[str]) -> dict[str, AURanks]:
    start = time.perf_counter()
    by_site = screen(
        bench.task.pairs, bench.model, bench.tokenizer, sites, momentum=momentum, protocol=bench.task_spec.protocol,
        groups=bench.task.groups, progress=not bench.model_spec.embedded,
    )  # fmt: skip
    seconds = round((time.perf_counter() - start) / len(sites), 2)
    for ranks in by_site.values():
        ranks.header |= {"code": screening_code(bench, momentum), "seconds": seconds}
    return by_site
