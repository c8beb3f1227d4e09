"""Average columns that are training seeds of one model. They answer the same items, so chance shows between seeds only.

The error of an average over tasks comes from items, because each task has its own. Seeds share their items and differ far
more than items would suggest, so the gain of one seed is no evidence for the method.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.statistics import holm, t_interval
from paper.render.significance_marks import LEVEL, Table
from paper.render.values import Value

GAIN = "gain over vanilla"


def over_seeds(table: Table, name: str, parts: Sequence[str]) -> list[str]:
    """Add every row's mean, and its mean paired gain with a t interval and Holm stars. Return the new columns."""
    vanilla = _shares([table["vanilla"][part] for part in parts]) if "vanilla" in table else None
    gain_values, ps = [], []
    for row, cells in table.items():
        values = [cells[part] for part in parts]
        shares, cells[GAIN] = _shares(values), Value("")
        if shares is None:
            whys = [value.why for value in values if value.why]
            cells[name] = Value(why=f"a part is missing: {whys[0]}" if whys else "a part is missing")
            continue
        draws = len(values[0].hits)
        ids = [id for value in values for id in value.ids]
        facts = ["mean over the seeds" + (f" and their {draws} draws" if draws > 1 else "")]
        cells[name] = Value(f"{np.mean(shares):.1f}", facts=facts, number=float(np.mean(shares)), ids=ids)
        if row == "vanilla" or vanilla is None or len(parts) < 2 or not all(value.fair for value in values):
            continue
        gains = [after - before for before, after in zip(vanilla, shares, strict=True)]
        mean, low, high, p = t_interval(gains)
        by_seed = "by seed " + " ".join(f"{gain:+.1f}" for gain in gains)
        cells[GAIN] = Value(
            f"{mean:+.1f}", f"[{low:+.1f}, {high:+.1f}]", [by_seed], number=mean, gain=(mean, low, high), ids=ids
        )
        gain_values.append(cells[GAIN])
        ps.append(p)
    for value, p in zip(gain_values, holm(ps), strict=True):
        value.p, value.significant = p, p < LEVEL
    return [name, GAIN]


def _shares(values: Sequence[Value]) -> list[float] | None:
    """Return the percentage per seed; for a control, the mean of its draws."""
    if any(not value.hits for value in values):
        return None
    return [float(np.mean([100 * sum(draw) / len(draw) for draw in value.hits])) for value in values]
