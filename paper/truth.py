"""Compare what scores say of single AUs with what these AUs truly do, on pairs that no score has seen.

For the strongest AUs of every score, at dose 1 and at the plan's own dose, the change of the tempered objective is measured
by forwards from the AU's layer on. Each AU is run once per dose, however many scores name it. The plan's own strongest AUs
are also measured within the plan, where all its other gates are set: alone and within differ where AUs interact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from austeer.code_identity import code_hash
from austeer.errors import AUSteerError
from austeer.files import read_json, read_tensors, write_json, write_tensors
from austeer.first_order import check_first_order, first_order_lies, strongest, without_lies
from austeer.identity import fingerprint
from austeer.integrated import integrated_gradients
from austeer.objective import Gates, Objective, gates_of
from austeer.pairs import pairs_hash
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.relp import relp_rules
from austeer.temperature import Temperature
from austeer.truth import log_odds_of_changes
from eval.statistics import spearman
from experiments.bench import Bench
from experiments.ranking import ranks_of
from experiments.records import record_id
from MFU_screening import TEMPERED
from paper.studies.answers import held_out_pairs
from rmodels import code_roots

SLOPES = {  # scores whose product with a dose is a change in nats
    "gradient": "gradient",
    "integrated": "integrated gradient along the plan",
    "second order": "gradient + half a Hessian product",
    "relp": "RelP",
}
SCORES = {
    **SLOPES,
    "t": "t of the gradient",
    "published": "published share",
    "difference": "mean difference (CNA-like)",
    "random": "random",
}
PLAN, WITHIN = "plan", "within the plan"
FORMAT = "austeer-truth-scores-1"


class Run(NamedTuple):
    """Name one measured change: an AU with what is added to its gate, in the unsteered model or within the plan."""

    layer: int
    dim: int
    dose: float
    within: bool

    def __str__(self) -> str:
        return f"{self.layer} {self.dim} {self.dose:.6g}{' within' * self.within}"


@dataclass(frozen=True)
class Settings:
    sites: tuple[str, ...]
    top: int = 200  # AUs per score
    n: int = 32  # held-out pairs
    doses: tuple[float, ...] = (1.0,)
    points: int = 4  # of the integral
    checked: int = 16  # ranking pairs on which the correction is measured
    seed: int = 0


@dataclass
class Study:
    """Hold what is compared: a bench, the plan's gates at the chosen sites, and pairs to score and to judge by."""

    bench: Bench
    gates: Gates
    ranks: dict[str, AURanks]
    ranking: Objective
    judged: Objective
    settings: Settings
    path: Path  # of the record; files of scores lie beside it
    record: dict

    @classmethod
    def of(cls, bench: Bench, plan: Plan, settings: Settings, folder: Path) -> Study:
        given = {site: values for site, values in gates_of(plan).items() if values.any()}
        if missing := sorted(set(settings.sites) - set(given)):
            raise AUSteerError(f"the plan has no gates at {', '.join(missing)}: name its sites with --site")
        gates = {site: given[site] for site in settings.sites}
        ranks = {site: ranks_of(bench, TEMPERED, site) for site in settings.sites}
        temperature = Temperature.of_header(ranks[settings.sites[0]].header)
        ranking, judged = (
            Objective(bench.model, bench.tokenizer, pairs, temperature, progress=True)
            for pairs in (bench.task.pairs, held_out_pairs(bench, settings.n))
        )
        key = {
            "method": "truth", "task": bench.task_spec.label, "fingerprint": fingerprint(bench.model),
            "dtype": str(bench.model.dtype), "kernel": bench.model.config._attn_implementation,
            "pairs_hash": pairs_hash(ranking.pairs), "judged_hash": pairs_hash(judged.pairs),
            "temperature": temperature.header(), "plan": _digest(gates),
            "code": code_hash(
                log_odds_of_changes, Objective, integrated_gradients, relp_rules, *code_roots(type(bench.model))
            ),
        }  # fmt: skip
        path = folder / f"{record_id(key)}.json"
        record = read_json(path) if path.exists() else {**key, "changes": {site: {} for site in gates}, "notes": {}}
        for site in gates:
            record["changes"].setdefault(site, {})
        return cls(bench, gates, ranks, ranking, judged, settings, path, record)

    def save(self) -> None:
        write_json(self.path, self.record)


def slopes(study: Study, name: str, objective: Objective) -> dict[str, Gates]:
    """Return the scores of SLOPES on the pairs of an objective, kept in a file beside the record."""
    file = study.path.with_name(f"{study.path.stem}-slopes-{name}-{study.settings.points}.safetensors")
    if not file.exists():
        found, note = _slopes(study, objective)
        tensors = {f"{score}.{site}": values for score, by_site in found.items() for site, values in by_site.items()}
        write_tensors(file, tensors, {"format": FORMAT, "note": note})
    tensors, metadata = read_tensors(file, FORMAT, "scores")
    study.record["notes"][name] = metadata["note"]
    found = {score: {site: tensors.get(f"{score}.{site}") for site in study.gates} for score in SLOPES}
    return {score: by_site for score, by_site in found.items() if None not in by_site.values()}


def _slopes(study: Study, objective: Objective) -> tuple[dict[str, Gates], str]:
    nothing = {site: values * 0 for site, values in study.gates.items()}
    gradient = objective.gradient(nothing)
    product, how = objective.curvature(nothing, study.gates)
    second = {site: gradient[site] + product[site] / 2 for site in gradient}
    integrated = integrated_gradients(objective, study.gates, study.settings.points)
    found = {"gradient": gradient, "second order": second, "integrated": integrated.gradient}
    promised = [
        sum(float((score[site] * gates).sum()) for site, gates in study.gates.items()) for score in (gradient, second)
    ]
    note = (
        f"the plan changes the objective by {integrated.gain:+.5f}; integrated shares add up to {integrated.total:+.5f} "
        f"({100 * integrated.gap:.2f} % off); promised by the gradient {promised[0]:+.5f}, with half a Hessian product "
        f"(by {how}) {promised[1]:+.5f}"
    )
    try:
        with relp_rules(study.bench.model):
            found["relp"] = objective.gradient(nothing)
    except AUSteerError as error:
        note += f"; no RelP: {error}"
    return found, note


def scores(study: Study, by_slope: dict[str, Gates]) -> dict[str, Gates]:
    """Return all scores of every AU, signed: whether to raise or to lower it."""
    generator = torch.Generator().manual_seed(study.settings.seed)
    activation = {site: ranks_of(study.bench, "activation", site) for site in study.gates}
    return by_slope | {
        "t": {site: ranks.score for site, ranks in study.ranks.items()},
        "published": {site: ranks.score for site, ranks in activation.items()},
        "difference": {site: ranks.stats["sum_momentum"] for site, ranks in activation.items()},
        "random": {site: torch.randn(gates.shape, generator=generator) for site, gates in study.gates.items()},
    }


@dataclass(frozen=True)
class Selection:
    """Name AUs that are judged together: the strongest by one score, or of the plan, at one dose."""

    by: str  # a score, or PLAN
    site: str
    dose: str
    runs: list[Run]


def selections(study: Study, by_score: dict[str, Gates]) -> list[Selection]:
    found = []
    for site, gates in study.gates.items():
        exists, typical = study.ranks[site].exists, float(gates[gates != 0].abs().median())
        for name, values in by_score.items():
            size = torch.where(exists, values[site].abs().double(), -1.0).flatten()
            best = torch.sort(size, descending=True, stable=True).indices[: study.settings.top]
            aus = [divmod(au, gates.shape[1]) for au in best.tolist()]
            signs = [1.0 if float(values[site][au]) >= 0 else -1.0 for au in aus]
            for dose in study.settings.doses:
                runs = [Run(*au, sign * dose, False) for au, sign in zip(aus, signs, strict=True)]
                found.append(Selection(name, site, f"{dose:g}", runs))
            own = [float(gates[au]) or sign * typical for au, sign in zip(aus, signs, strict=True)]
            found.append(
                Selection(name, site, PLAN, [Run(*au, dose, False) for au, dose in zip(aus, own, strict=True)])
            )
        aus = strongest({site: gates}, by_score["gradient"], study.settings.top)
        for dose, within in ((PLAN, False), (WITHIN, True)):
            runs = [Run(layer, dim, float(gates[layer, dim]), within) for _, layer, dim in aus]
            found.append(Selection(PLAN, site, dose, runs))
    return found


def run(study: Study, chosen: Sequence[Selection], progress: bool) -> None:
    """Measure every run of the selections that the record lacks, a layer at a time; the record is saved after each."""
    missing = {}
    for site in study.gates:
        runs = {run for selection in chosen if selection.site == site for run in selection.runs}
        for one in sorted(runs):
            if str(one) not in study.record["changes"][site]:
                missing.setdefault((site, one.layer, one.within), []).append(one)
    layers = len(next(iter(study.gates.values())))
    total = sum(len(runs) * (layers - layer) for (_, layer, _), runs in missing.items())
    with tqdm(total=total, desc="single AUs", unit=" layers", disable=not progress) as bar:
        for (site, layer, within), runs in missing.items():
            plan = study.gates if within else None
            doses = [(run.dim, -run.dose if within else run.dose) for run in runs]  # within: taken out of the plan
            before, after = log_odds_of_changes(study.judged, site, layer, doses, plan)
            changes = study.judged.of_log_odds(after) - study.judged.of_log_odds(before)
            for one, change in zip(runs, -changes if within else changes, strict=True):
                study.record["changes"][site][str(one)] = [float(f"{value:.6g}") for value in change]
            study.save()
            bar.update(len(runs) * (layers - layer))


def true_changes(study: Study, selection: Selection) -> Tensor:
    """Return the measured change of every run and judged pair, (runs, pairs)."""
    changes = study.record["changes"][selection.site]
    return torch.tensor([changes[str(run)] for run in selection.runs], dtype=torch.float64)


def agreement(predicted: Tensor, true: Tensor) -> dict:
    """Compare predictions with changes of the objective: in order, in size, in direction."""
    return {
        "rho": list(spearman(predicted.tolist(), true.tolist())),
        "slope": float((predicted * true).sum() / predicted.square().sum()),
        "same_way": float((predicted * true > 0).double().mean()),
        "lies": float(first_order_lies(predicted, true).double().mean()),
    }


def compare(
    study: Study, chosen: Sequence[Selection], by_score: dict[str, Gates], on_judged: dict[str, Gates]
) -> list[dict]:
    """Return a row per selection and score: how well the score tells the changes of the selected AUs."""
    rows = []
    for selection in chosen:
        changes = true_changes(study, selection)
        true, halves = changes.mean(1), (changes[:, ::2].mean(1), changes[:, 1::2].mean(1))
        noise = spearman(*(half.tolist() for half in halves))[0]
        where = {"site": selection.site, "dose": selection.dose, "by": selection.by, "halves": noise, "n": len(true)}
        for name in on_judged if selection.by == PLAN else [selection.by]:
            row = where | {"score": name, "ranking": agreement(_predicted(by_score[name], selection), true)}
            if name in on_judged:
                row["judged"] = agreement(_predicted(on_judged[name], selection), true)
            rows.append(row)
    return rows


def _predicted(score: Gates, selection: Selection) -> Tensor:
    values = score[selection.site].double()
    return torch.tensor([float(values[run.layer, run.dim]) * run.dose for run in selection.runs], dtype=torch.float64)


def correct(study: Study, chosen: Sequence[Selection], gradient: Gates) -> dict:
    """Check the plan's strongest AUs on a few ranking pairs. Judge the corrected predictions, and the plan without the AUs that failed.

    gradient: on the judged pairs. Times what is left of the slope at the gate, by the ranking pairs, it is the corrected prediction.
    """
    task, temperature = study.bench.task, study.judged.temperature
    draw = torch.randperm(len(task.pairs), generator=torch.Generator().manual_seed(study.settings.seed))
    pairs = [task.pairs[number] for number in draw[: study.settings.checked].tolist()]
    objective = Objective(study.bench.model, study.bench.tokenizer, pairs, temperature)
    rows, reduced = [], study.gates
    for selection in chosen:
        if selection.by != PLAN or selection.dose != PLAN:
            continue
        aus = [(selection.site, run.layer, run.dim) for run in selection.runs]
        check = check_first_order(objective, study.gates, aus)
        reduced, true = without_lies(reduced, check), true_changes(study, selection).mean(1)
        rows.append({
            "site": selection.site, "of": len(aus), "forwards": check.forwards,
            "lies": [[layer, dim] for (_, layer, dim), lies in zip(aus, check.lies.tolist(), strict=True) if lies],
            "corrected": agreement(_predicted(gradient, selection) * check.ratio, true),
        })  # fmt: skip
    of_nothing = {site: values * 0 for site, values in study.gates.items()}
    nothing, whole, rest = map(study.judged.value, (of_nothing, study.gates, reduced))
    return {"rows": rows, "pairs": len(pairs), "plan": whole - nothing, "reduced plan": rest - nothing}


def _digest(gates: Gates) -> str:
    digest = hashlib.sha256()
    for site, values in sorted(gates.items()):
        digest.update(site.encode() + values.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
