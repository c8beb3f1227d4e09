"""Controls: k AUs shifted by their mean activation difference (AUSteer, Table 3).

x_i -> x_i + alpha * mean over pairs of (x_i(right) - x_i(wrong)): nothing is scaled. `mean-difference` also chooses the
AUs by the size of that difference, so shares of pairs play no part; `fixed-vector` chooses them as AUSteer does.
"""

from __future__ import annotations

from austeer.methods.attribution import ALPHAS, KS
from austeer.methods.austeer import AUSteer


class MeanDifference(AUSteer):
    name, label = "mean-difference", "AUs shifted by mean difference"
    paper = "control: AUSteer, Table 3, Act. Diff. with Fixed Vec."
    edits = "k AUs, shifted"
    options = {"location": "difference", "strength": "vector"}
    axes = {"k": KS, "alpha": ALPHAS}


class FixedVector(MeanDifference):
    name, label = "fixed-vector", "AUSteer, fixed vector"
    paper = "AUSteer, Table 3, Fixed Vec."
    options = {"strength": "vector"}


METHODS = (MeanDifference(), FixedVector())
