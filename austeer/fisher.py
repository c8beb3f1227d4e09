"""The Fisher information of gates: what steering costs, before anything is steered.

Let s be the derivative by the gates of log p(y_t | text before t), summed over the second half of a passage, with y_t drawn
from the model at every position. The KL of the unsteered to the steered model, per token, is then about
    1/2 E[(s . g)^2] / positions                                                  (of a plan with gates g)
since the terms of s at different positions are uncorrelated. From this file come
    diagonal  E[s_i^2] / positions of every AU, on the passages to choose by: it says which AUs are cheap
    scores    s itself, on the passages to price by: AUs together are not independent, so a plan is priced along its own
              direction, with the sum over AUs before the square
Both take one backward pass per passage and draw of y, and serve every plan for the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from austeer import processes
from austeer.batching import TOKENS_AT_ONCE, run_halving
from austeer.errors import AUSteerError
from austeer.files import read_tensors, write_tensors
from austeer.forward import input_device, probed
from austeer.identity import model_header, site_header
from austeer.neutral import NeutralText
from austeer.plan import Plan
from rmodels import site_shape

FORMAT = "austeer-fisher-2"
DRAWS = 2  # of y, on the passages to price by: more passages make a price more exact than more draws do


@dataclass
class Fisher:
    """Hold the diagonal of each site, (layers, width), and the scores, (passages x draws, layers, width).

    measure, report: the passages to measure and correct plans on, and those to report their cost on, so that whoever has
    this file does so on the same text.
    """

    diagonal: dict[str, Tensor]
    scores: dict[str, Tensor]
    measure: Tensor
    report: Tensor
    header: dict = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        return list(self.diagonal)

    def only(self, sites: Sequence[str]) -> Fisher:
        header = self.header | {"relative_error": {site: self.header["relative_error"][site] for site in sites}}
        return Fisher(
            *({s: part[s] for s in sites} for part in (self.diagonal, self.scores)), self.measure, self.report, header
        )

    @classmethod
    def pooled(cls, parts: Sequence[Fisher]) -> Fisher:
        """Put the sites of several measurements together. They must be of one model and one text."""
        first = parts[0]
        for key in ("fingerprint", "neutral_hash", "seed"):
            if len({one.header[key] for one in parts}) > 1:
                raise AUSteerError(f"the files of Fisher information differ in {key}: measure all sites alike")
        diagonal = {site: values for one in parts for site, values in one.diagonal.items()}
        scores = {site: values for one in parts for site, values in one.scores.items()}
        header = {key: value for one in parts for key, value in one.header.items()}
        header["relative_error"] = {s: e for one in parts for s, e in one.header["relative_error"].items()}
        return cls(diagonal, scores, first.measure, first.report, header)

    def price(self, products: Tensor) -> float:
        """Return the KL per token of gates whose products with the scores, (passages x draws,), are these."""
        return self.price_with_error(products)[0]

    def price_with_error(self, products: Tensor) -> tuple[float, float]:
        """Return that KL, and its standard error over the passages."""
        by_passage = products.double().square().view(-1, self.header["draws"]).mean(1) / 2 / self.header["positions"]
        return float(by_passage.mean()), float(by_passage.std() / len(by_passage) ** 0.5)

    def save(self, path: str | Path) -> None:
        tensors = {f"diagonal.{site}": values for site, values in self.diagonal.items()}
        tensors |= {f"scores.{site}": values for site, values in self.scores.items()}
        metadata = {"format": FORMAT, "header": json.dumps(self.header, sort_keys=True)}
        write_tensors(Path(path), {**tensors, "measure": self.measure, "report": self.report}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        tensors, metadata = read_tensors(Path(path), FORMAT, "Fisher information")
        parts = {
            part: {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{part}.")}
            for part in ("diagonal", "scores")
        }
        return cls(**parts, measure=tensors["measure"], report=tensors["report"], header=json.loads(metadata["header"]))


def why_unpriced(plan: Plan, fisher: Fisher | None = None) -> str | None:
    """Say why the cost of a plan cannot be predicted; None if it can, from this or else from any Fisher information."""
    if plan.shifts:
        return "it shifts AUs, and the Fisher information is that of gates"
    if plan.tokens != "all":
        return f"it steers the tokens {plan.tokens!r} only, and the Fisher information is that of all"
    if fisher is None:
        return None
    missing = [site for site in plan.sites if site not in fisher.sites]
    if missing:
        return f"the Fisher information was not measured at site {', '.join(missing)}"
    ours, theirs = fisher.header.get("fingerprint"), plan.header.get("fingerprint")
    if ours and theirs and ours != theirs:
        return "the Fisher information is that of other weights"
    return None


def predicted_kl(plan: Plan, fisher: Fisher) -> float:
    """Return the KL of the unsteered to the steered model, in nats per token of neutral text, before anything is run."""
    reason = why_unpriced(plan, fisher)
    if reason:
        raise AUSteerError(f"the cost of this plan cannot be predicted: {reason}; measure it")
    products = torch.zeros(len(next(iter(fisher.scores.values()))), dtype=torch.float64)
    for site, scales in plan.scales.items():
        steered = scales.flatten().nonzero().flatten()
        products += fisher.scores[site].flatten(1)[:, steered].double() @ scales.flatten()[steered].double()
    return fisher.price(products)


def measure_fisher(
    model: PreTrainedModel, sites: Sequence[str], neutral: NeutralText, *, seed: int = 0, progress: bool = True
) -> Fisher:
    """Measure the Fisher information of the gates at these sites. y is drawn from `seed`, passage by passage."""
    choose, price, measure, report = map(neutral.part, ("choose", "price", "measure", "report"))
    positions, device = neutral.passages.shape[1] // 2, input_device(model)
    shapes = {site: site_shape(model, site) for site in sites}
    diagonal = {site: torch.zeros(shape) for site, shape in shapes.items()}
    scores = {site: torch.zeros(len(price) * DRAWS, *shape, dtype=torch.bfloat16) for site, shape in shapes.items()}
    totals = {site: torch.zeros(len(choose), dtype=torch.float64) for site in sites}

    def choosing(rows: list[int]) -> None:
        for (site, layer), found in _scores(model, sites, choose[rows], rows, 1, seed).items():
            squares = found[0].float().square().cpu()
            diagonal[site][layer, : squares.shape[1]] += squares.sum(0)
            totals[site][rows] += squares.sum(1).double()

    def pricing(rows: list[int]) -> None:
        numbers = [len(choose) + row for row in rows]
        for (site, layer), found in _scores(model, sites, price[rows], numbers, DRAWS, seed).items():
            places = torch.tensor([row * DRAWS + draw for draw in range(DRAWS) for row in rows])
            scores[site][places, layer, : found.shape[2]] = found.flatten(0, 1).to(scores[site])

    at_once = max(1, TOKENS_AT_ONCE.get(device.type, 8192) // neutral.passages.shape[1])
    silent = None if progress and processes.is_main() else True
    with tqdm(total=len(choose) + len(price), desc="Fisher information", unit=" passages", disable=silent) as bar:
        for run, count in ((choosing, len(choose)), (pricing, len(price))):
            batches = [list(range(start, min(start + at_once, count))) for start in range(0, count, at_once)]
            remedy = "use 4-bit, or a larger GPU"
            for batch, _ in run_halving(processes.own_share(batches), run, "passages", bar.write, remedy):
                bar.update(len(batch))
    processes.add_over_processes([*diagonal.values(), *scores.values(), *totals.values()])
    tokens = len(choose) * positions
    for site, total in totals.items():
        diagonal[site] /= tokens
        if not torch.isfinite(total).all():
            raise AUSteerError(
                f"gradients at site {site} are inf or nan in {model.dtype}; load the model in bfloat16 or float32"
            )
    spread = {site: float(total.std() / total.mean() / len(total) ** 0.5) for site, total in totals.items()}
    header = model_header(model) | {key: v for site in sites for key, v in site_header(model, site).items()}
    header |= {
        "neutral": neutral.name, "neutral_hash": neutral.hash, "tokens": tokens, "positions": positions,
        "pricing_tokens": len(price) * positions, "draws": DRAWS, "seed": seed, "relative_error": spread,
    }  # fmt: skip
    return Fisher(diagonal, scores, measure, report, header)


def _scores(
    model: PreTrainedModel, sites: Sequence[str], ids: Tensor, numbers: Sequence[int], draws: int, seed: int
) -> dict[tuple[str, int], Tensor]:
    """Return s at every gate, (draws, passages, width) by site and layer; numbers: of the passages, each a seed of its own."""
    half = ids.shape[1] // 2
    with probed(model, sites, len(ids), lambda x, g: x + x * g) as probes:
        logits = model(input_ids=ids.to(input_device(model)), use_cache=False, logits_to_keep=half + 1).logits
        log_p = logits[:, :-1].float().log_softmax(-1)
        drawn = torch.stack([
            torch.multinomial(
                rows.exp(), draws, True, generator=torch.Generator(rows.device).manual_seed(seed * 100_003 + number)
            )
            for rows, number in zip(log_p.detach(), numbers, strict=True)
        ])  # (passages, positions, draws), the same in any batch  # fmt: skip
        found = [
            torch.autograd.grad(
                log_p.gather(2, drawn[..., draw, None]).sum(), list(probes.values()), retain_graph=draw + 1 < draws
            )
            for draw in range(draws)
        ]
    return {place: torch.stack([by_place[i] for by_place in found])[:, :, 0] for i, place in enumerate(probes)}
