"""Find the strength at which a change of a model has a stated cost, in few tries: each try is a pass over the text."""

from __future__ import annotations

import math
from collections.abc import Sequence


def next_try(tried: Sequence[tuple[float, float]], cost: float, slope: float) -> float:
    """Return the strength to try next, from the strengths that were tried and what they cost (inf: too strong to tell).

    It is where the line through the two nearest tries, in logarithms, has the stated cost, unless that lies outside of what
    is known to be too weak and too strong: then it is the middle of these. slope: d log cost / d log strength to begin with.
    """
    weak = max((strength for strength, paid in tried if paid < cost), default=0.0)
    strong = min((strength for strength, paid in tried if paid >= cost), default=math.inf)
    known = [(math.log(strength), math.log(paid / cost)) for strength, paid in tried if math.isfinite(paid)]
    if not known:
        return strong / 10
    (x0, y0), *others = sorted(known, key=lambda one: abs(one[1]))
    if others and others[0][0] != x0:
        slope = min(max((others[0][1] - y0) / (others[0][0] - x0), slope / 2), slope * 4)
    step = math.exp(x0 - y0 / slope)
    if weak < step < strong:
        return step
    return math.sqrt(weak * strong) if weak and math.isfinite(strong) else weak * 10 or strong / 10
