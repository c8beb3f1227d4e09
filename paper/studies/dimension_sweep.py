"""Figures 2, 6, 7 and 8: single dimensions of one block, each steered alone, against the block as a whole.

params: site, layer, head (None: the whole layer's output), step (sweep every step-th dimension), alpha (x -> (1 + alpha) x),
    n (at most this many items of either split), positive and mixed (how many of the best dimensions make the positive
    combination, and how many of the worst join them in the mixed one), paper_dims (on a block of the paper, the
    dimensions it combined: positive, and those that join them in mixed).

printed: the paper's accuracies in percent, by label; they are drawn as lines.

Combinations are chosen twice: on validation items and, as in the paper, on the very test items that they are then
tested on; where the paper's own are known, they are tested too. SADI and ITI edit this block alone, at the strength
that is best on validation.
"""

from __future__ import annotations

from pathlib import Path

from austeer.evidence import Evidence
from austeer.methods.iti import ALPHAS as ITI_ALPHAS
from austeer.methods.iti import ITI
from austeer.methods.sadi import SADIHead, SADIHidden
from austeer.plan import Plan
from eval.statistics import holm, mcnemar, wilson
from experiments.bench import Bench
from paper.studies import picture
from paper.studies.block import Block, Evaluator, n_dims
from paper.studies.counting import place

CHOOSERS = {  # who chose a combination -> the style of its lines, and their name
    "validation": ("-", "chosen on validation"),
    "test": (":", "chosen on test"),  # the paper's way
    "paper": ("-.", "the paper's dimensions"),
}
WHOLE_BLOCKS = 30  # about how many plans are not single dimensions: whole block, combinations, ITI, SADI


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    block, alpha = Block.of(model, params), params["alpha"]
    dims = list(range(0, block.width, params["step"]))
    splits = {"validation": task.validation[: params["n"]], "test": task.test[: params["n"]]}
    evaluators = {part: Evaluator(bench, items) for part, items in splits.items() if items}
    unsteered = {part: evaluator.scores(block.plan({})) for part, evaluator in evaluators.items()}
    vanilla = {part: scores.outcomes for part, scores in unsteered.items()}
    sweeps = {part: evaluator.sweep(block, dims, alpha, progress, part) for part, evaluator in evaluators.items()}

    def test(plan: Plan) -> dict:
        outcomes = evaluators["test"].outcomes(plan)
        return {"right": sum(outcomes), "p": mcnemar(vanilla["test"], outcomes)[2]}

    chosen_on = next(iter(evaluators))  # validation, if there is one

    def best_of(plans: dict[float, Plan]) -> dict:
        strength = max(plans, key=lambda strength: sum(evaluators[chosen_on].outcomes(plans[strength])))
        return {"alpha": strength, "chosen_on": chosen_on, **test(plans[strength])}

    whole = {"block": {"alpha": alpha, **test(block.plan(dict.fromkeys(range(block.width), alpha)))}}
    whole["sadi"] = best_of(_sadi(block, bench.grid_kind))
    if block.head is not None:
        iti = ITI().prepare(Evidence(model, tokenizer, task.pairs, block.site))
        whole["iti"] = best_of(_iti(block, iti, bench.grid_kind))

    combinations = {}
    for part in evaluators:
        gains = {dim: sum(outcomes) - sum(vanilla[part]) for dim, outcomes in zip(dims, sweeps[part], strict=True)}
        good, bad = _beneficial(gains, params["positive"]), _detrimental(gains, params["mixed"])
        combinations[part] = {"positive": _combined(block, good, alpha, test)}
        if good and bad:
            combinations[part]["mixed"] = _combined(block, good + bad, alpha, test)
    if "paper_dims" in params:
        good, bad = (params["paper_dims"][key] for key in ("positive", "mixed"))
        combinations["paper"] = {
            "positive": _combined(block, good, alpha, test),
            "mixed": _combined(block, good + bad, alpha, test),
        }
    ps = holm([mcnemar(vanilla["test"], outcomes)[2] for outcomes in sweeps["test"]])
    return {
        "task": bench.task_spec.label,
        "measure": unsteered["test"].main,
        "n": {part: len(outcomes) for part, outcomes in vanilla.items()},
        "vanilla": {part: sum(outcomes) for part, outcomes in vanilla.items()},
        "dims": dims,
        "right": {part: [sum(outcomes) for outcomes in by_dim] for part, by_dim in sweeps.items()},
        "p_holm": ps,  # per dimension on the test split, adjusted for their number
        "whole": whole,
        "combinations": combinations,  # key: who chose them (CHOOSERS); all are tested on the test split
    }


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return (n_dims(params) + WHOLE_BLOCKS) * (params["n"] + min(params["n"], n_validation))


def _beneficial(gains: dict[int, int], count: int) -> list[int]:
    """Return the best dimensions among those that help; ties go to the lower dimension."""
    return sorted((dim for dim in gains if gains[dim] > 0), key=lambda dim: (-gains[dim], dim))[:count]


def _detrimental(gains: dict[int, int], count: int) -> list[int]:
    return sorted((dim for dim in gains if gains[dim] < 0), key=lambda dim: (gains[dim], dim))[:count]


def _combined(block: Block, dims: list[int], alpha: float, test) -> dict:
    return {"dims": dims, **test(block.plan(dict.fromkeys(dims, alpha)))}


def _sadi(block: Block, kind: str) -> dict[float, Plan]:
    """Return SADI's plans by strength: they scale the whole block, from the prompt's last token on."""
    alphas = (SADIHead if block.head is not None else SADIHidden).axes["alpha"][kind]
    return {alpha: block.plan(dict.fromkeys(range(block.width), alpha), "last") for alpha in alphas}


def _iti(block: Block, heads, kind: str) -> dict[float, Plan]:
    direction = heads.sigma[block.layer, block.head] * heads.direction[block.layer, block.head]
    return {a: block.shifted(a * direction, "last") for a in ITI_ALPHAS[kind]}


def draw(result: dict, params: dict, path: Path, printed: dict) -> None:
    figure, axis = picture.subplots(size=(12.5, 5.8))
    n, dims = result["n"]["test"], result["dims"]

    def percent(right: int) -> float:
        return 100 * right / n

    swept = [percent(right) for right in result["right"]["test"]]
    axis.plot(dims, swept, "-o", color=picture.BLUE, mfc="white", ms=7, lw=1.2, label="one dimension alone", zorder=3)
    significant = [(dim, y) for dim, y, p in zip(dims, swept, result["p_holm"], strict=True) if p < 0.05]
    if significant:
        label = "the same, differs from vanilla (McNemar, Holm, p < 0.05)"
        axis.plot(*zip(*significant, strict=True), "o", color=picture.BLUE, ms=7, label=label, zorder=4)
    low, high = (100 * edge for edge in wilson(result["vanilla"]["test"], n))
    axis.axhspan(low, high, color=picture.GREY, alpha=0.12, lw=0, label="vanilla, 95 % interval")
    picture.draw_levels(axis, _levels(result, printed, percent))
    margin = 0.02 * (dims[-1] - dims[0]) or 0.5
    axis.set(xlabel="dimension", ylabel=f"{result['measure']} in %", xlim=(dims[0] - margin, dims[-1] + margin))
    axis.set_title(f"{result['task']}: {place(params)}, alpha = {params['alpha']:g}, n = {n}")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    picture.save(figure, path)


def _levels(result: dict, printed: dict[str, float], percent) -> list[picture.Level]:
    levels = [picture.Level(percent(result["vanilla"]["test"]), "vanilla", picture.GREY, "--", 1.5)]
    names = {
        "iti": ("ITI, this head", picture.GREEN),
        "sadi": ("SADI, this block", picture.ORANGE),
        "block": ("whole block", picture.SKY),
    }
    for key, (name, color) in names.items():
        if key in result["whole"]:
            whole = result["whole"][key]
            levels.append(picture.Level(percent(whole["right"]), f"{name}, alpha {whole['alpha']:g}", color))
    for chooser_key, pair in result["combinations"].items():
        style, chooser = CHOOSERS[chooser_key]
        for key, color in (("positive", picture.VERMILLION), ("mixed", picture.PURPLE)):
            if pair.get(key, {}).get("dims"):
                levels.append(picture.Level(percent(pair[key]["right"]), f"{key}, {chooser}", color, style))
    style = (0, (8, 3, 1, 3))
    return levels + [picture.Level(y, f"the paper's {name}", picture.BLACK, style, 1.0) for name, y in printed.items()]


def note(result: dict, params: dict) -> str:
    """Say what was swept, and what each combination consists of, or why there is none."""
    count, step = len(result["dims"]), params["step"]
    swept = f"all {count} dimensions" if step == 1 else f"one dimension in {step}, {count} in all"
    sentences = [f"Swept: {swept}."]
    for chooser_key, pair in result["combinations"].items():
        good = pair["positive"]["dims"]
        if not good:
            combination = "no combination, because no swept dimension helps there"
        elif "mixed" in pair:
            added = pair["mixed"]["dims"][len(good) :]
            combination = f"positive {_join(good)}; mixed adds {_join(added)}"
        else:
            combination = f"positive {_join(good)}; no mixed combination, because no swept dimension harms there"
        chooser = CHOOSERS[chooser_key][1]
        sentences.append(f"{chooser[0].upper()}{chooser[1:]}: {combination}.")
    return " ".join(sentences)


def _join(dims: list[int]) -> str:
    return ", ".join(map(str, dims))
