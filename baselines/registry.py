"""Every method by name, in the order of tables. A new method is a file beside this one and a line here."""

from __future__ import annotations

from baselines.all_aus import AllAUs
from baselines.attribution import AttributionAUs, AttributionHeads
from baselines.austeer import AUSteer, Causal, DifferenceAUs, FlippedAUs, RandomAUs, SignAware
from baselines.base import Method
from baselines.caa import CAA
from baselines.iti import ITI
from baselines.learned_scaling import LearnedScaling
from baselines.linear_act import LinearAcT
from baselines.mean_difference import MeanDifference
from baselines.mediation import Mediation
from baselines.neurosteer import NeuroSteer
from baselines.restore_lcc import RestoreLCC
from baselines.sadi import SADIHead, SADIHidden, SADINeuron
from baselines.sta import STA

_ALL = (
    RandomAUs(), FlippedAUs(), AUSteer(), SignAware(), Causal(), DifferenceAUs(), AllAUs(), MeanDifference(),
    ITI(), ITI("probe"), CAA(), SADIHead(), SADINeuron(), SADIHidden(), STA(), NeuroSteer(),
    LinearAcT(), AttributionAUs(), AttributionHeads(), Mediation(), LearnedScaling(),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
# repairs a pruned model, which the others do not have: main.py restore
OWN_COMMAND: dict[str, type[Method]] = {RestoreLCC.name: RestoreLCC}
# the comparison of the first page
DEFAULT = ("random", "flipped", "published", "sign-aware", "causal")
