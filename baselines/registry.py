"""Every method by name, in the order of tables. A new method is a file beside this one and a line here."""

from __future__ import annotations

from baselines.austeer import AUSteer, Causal, DifferenceAUs, FlippedAUs, RandomAUs, SignAware
from baselines.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (RandomAUs(), FlippedAUs(), AUSteer(), SignAware(), Causal(), DifferenceAUs())
}
# the comparison of the first page
DEFAULT = ("random", "flipped", "published", "sign-aware", "causal")
