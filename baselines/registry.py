"""Every method by name, in the order of tables. A new method is a file beside this one and a line here."""

from __future__ import annotations

from baselines.austeer import AUSteer, Causal, DifferenceAUs, FlippedAUs, RandomAUs, SignAware
from baselines.base import Method
from baselines.neurosteer import NeuroSteer
from baselines.restore_lcc import RestoreLCC
from baselines.sta import STA

_ALL = (
    RandomAUs(), FlippedAUs(), AUSteer(), SignAware(), Causal(), DifferenceAUs(), STA(), NeuroSteer(),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
# repairs a pruned model, which the others do not have: main.py restore
OWN_COMMAND: dict[str, type[Method]] = {RestoreLCC.name: RestoreLCC}
# the comparison of the first page
DEFAULT = ("random", "flipped", "published", "sign-aware", "causal")
