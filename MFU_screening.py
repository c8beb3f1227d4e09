"""Screening, the method's first half: rank every atomic unit (AU) by its momentum over contrastive pairs.

    python MFU_screening.py --model M --pairs pairs.jsonl --site ffn --out AU_ranks/M/task/ffn.safetensors
    accelerate launch MFU_screening.py ...            # the same ranks from several GPUs or nodes

Two momenta, each with its own score. Sums over pairs are all that is kept, so any batching, any order and any number
of processes give the same ranks.

activation (section 4.1 of the paper): m_ij = x_i(right text j) - x_i(wrong text j) at the last token,
    r+_i and r-_i = shares of the N pairs with m_ij > 0 and with m_ij < 0 (equation 2), score = the larger, signed
causal (ours, docs/sign.md): c_ij = d log sigmoid((M_j - offset_j) / tau) / d g_i, where M_j is the log-odds of the
    right answer over the wrong one and x_i is scaled by 1 + g_i at every position; score = the t statistic of c_i,
    direction = its sign. tau and offsets are fitted to the pairs (austeer/temperature.py), or tau is given.
    The older rows of this project have tau = 1 and no offsets.

MFU is the authors' older word for AU.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer import processes
from austeer.balance import answer_numbers, balanced
from austeer.batching import pair_batches, run_halving
from austeer.errors import AUSteerError, one_of, run_command
from austeer.forward import PairTexts, float64_device, input_device, log_odds_and_gradients, read_at
from austeer.identity import model_header, public_name, site_header
from austeer.pairs import Pair, as_pairs, pairs_hash
from austeer.ranks import AURanks, ranks_file
from austeer.temperature import FITTED, offsets, temperature_of
from austeer.tokens import PROTOCOLS, EncodedPair, Protocol, encode, longest_text
from rmodels import gates
from rmodels.experts import ExpertGate


class Momentum(ABC):
    """Sum one momentum over pairs: named sums of shape (layers, width) per site."""

    SUMS: dict[str, torch.dtype]

    def __init__(self, model: PreTrainedModel, sites: Sequence[str], protocol: Protocol):
        self.model, self.sites, self.protocol = model, sites, protocol
        self.device = float64_device(input_device(model))
        self.sums = {
            (site, name): [torch.zeros(gate.width, dtype=dtype, device=self.device) for gate in gates(model, site)]
            for site in sites
            for name, dtype in self.SUMS.items()
        }
        self.not_finite = torch.zeros((), dtype=torch.int64, device=self.device)  # read once, at the end
        self.reached = {  # pairs that each expert saw a token of, where the AUs are neurons of experts
            (gate.site, gate.layer): torch.zeros(gate.experts, dtype=torch.int64, device=self.device)
            for site in sites
            for gate in gates(model, site)
            if isinstance(gate, ExpertGate)
        }

    def expect(  # noqa: B027
        self, pairs: Sequence[Pair], groups: Sequence[str] | None, temperature: str | float, balance: bool
    ) -> None:
        """Prepare for these pairs. Most momenta need not know them beforehand."""

    @abstractmethod
    def add(self, batch: Sequence[EncodedPair]) -> None:
        """Add a batch of pairs. The sums change only once everything has been computed."""

    @staticmethod
    @abstractmethod
    def score(sums: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
        """Turn the sums over n pairs into the score to rank by and the gain that alpha multiplies."""

    def finish(self) -> None:
        """Complete the sums once all pairs are in: add those of all processes."""
        processes.add_over_processes([row for rows in self.sums.values() for row in rows])

    def header(self) -> dict:
        """Return what the ranks' header says of this momentum alone."""
        return {}

    def _accumulate(self, site: str, layer: int, **values: Tensor) -> None:
        for name, value in values.items():
            total = self.sums[site, name][layer]
            total += value.to(total)

    def _count_experts(self, site: str, layer: int, values: Tensor) -> None:
        """Count the pairs that reach an expert: its AUs are exactly zero for the others. values: (pairs, width)."""
        if (counts := self.reached.get((site, layer))) is not None:
            counts += values.unflatten(1, (len(counts), -1)).any(-1).sum(0)

    def _note_not_finite(self, values: Tensor) -> None:
        self.not_finite += (~torch.isfinite(values)).sum()

    def stats(self, site: str) -> dict[str, Tensor]:
        """Return the sums as (layers, width), zero where a layer is narrower than the widest."""
        return {name: pad_sequence(self.sums[site, name], batch_first=True).cpu() for name in self.SUMS}


def signed_share(sums: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Return s_i = max(r+_i, r-_i) with the sign of gamma_i (section 4.2): the paper's score, which is also the gain.

    All pairs count, also those without a difference; a tie of signs is positive, as in the authors' code.
    """
    positive, negative = sums["positive"], sums["negative"]
    share = torch.maximum(positive, negative).float() / n
    score = torch.where(positive < negative, -share, share)
    return score, score.clone()


def t_statistic(sums: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Return the mean of c over its standard error, and its sign."""
    mean = sums["sum"] / n
    variance = ((sums["sum_squares"] - n * mean.square()) / (n - 1)).clamp(min=0)
    return _over_error(mean, (variance / n).sqrt())


def balanced_t_statistic(stats: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Do the same with the balanced mean, where there is one (austeer/balance.py)."""
    if "balanced_mean" not in stats:
        return t_statistic(stats, n)
    return _over_error(stats["balanced_mean"], stats["balanced_error"])


def _over_error(mean: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    # an effect that is the same in every pair has no spread: bound its t, do not divide by zero
    error = torch.maximum(error, 1e-9 * mean.abs())
    score = torch.where(mean == 0, 0.0, mean / error).float()
    return score, score.sign()


class ActivationMomentum(Momentum):
    # the last two are for the ablations: activation difference, fixed vector, sign-aware strength
    SUMS = {
        "positive": torch.int32,
        "negative": torch.int32,
        "sum_momentum": torch.float64,
        "sum_activation": torch.float64,
    }
    score = staticmethod(signed_share)

    @torch.inference_mode()
    def add(self, batch: Sequence[EncodedPair]) -> None:
        texts = PairTexts(self.model, batch, logits=False)
        with read_at(self.model, self.sites, lambda x: x[range(len(texts.last)), texts.last]) as collected:
            texts.run_tails([tail for pair in batch for tail in (pair.positive, pair.negative)])
        for (site, layer), rows in collected.items():
            last = torch.cat(rows).to(self.device)  # (2 * pairs, width), at each last token: right, wrong, right, ...
            self._note_not_finite(last)
            self._count_experts(site, layer, last[0::2].abs() + last[1::2].abs())
            momentum = last[0::2] - last[1::2]
            # in the authors' float16 an overflow counts by its sign, and inf - inf as zero
            signs = last[0::2].half() - last[1::2].half() if self.protocol.round_to_half else momentum
            self._accumulate(
                site,
                layer,
                positive=(signs > 0).sum(0),
                negative=(signs < 0).sum(0),
                sum_momentum=momentum.sum(0, dtype=torch.float64),
                sum_activation=last[0::2].sum(0, dtype=torch.float64),
            )


class CausalMomentum(Momentum):
    SUMS = {"sum": torch.float64, "sum_squares": torch.float64}
    score = staticmethod(t_statistic)

    def add(self, batch: Sequence[EncodedPair]) -> None:
        for (site, layer), c in self.effects(batch).items():
            self._note_not_finite(c)
            self._count_experts(site, layer, c)
            self._accumulate(site, layer, sum=c.sum(0), sum_squares=c.square().sum(0))

    def effects(self, batch: Sequence[EncodedPair]) -> dict[tuple[str, int], Tensor]:
        """Return c of every pair and AU, (pairs, width) by site and layer: one backward pass to the gates."""
        log_odds, by_place = log_odds_and_gradients(self.model, self.sites, batch, lambda x, g: x + x * g)
        # d log sigmoid(M) / d M; it would underflow in float16
        slope = torch.sigmoid(-log_odds.to(self.device).double())[:, None]
        return {place: gradient.to(self.device).double() * slope for place, gradient in by_place.items()}


class TemperedMomentum(Momentum):
    """Keep dM / dg of every pair until all log-odds are known: only then can tau be fitted, which weighs the pairs.

    What is kept goes into the ranks, because folds, discriminants and controls are all made from it.
    """

    SUMS = CausalMomentum.SUMS
    score = staticmethod(balanced_t_statistic)

    def expect(
        self, pairs: Sequence[Pair], groups: Sequence[str] | None, temperature: str | float, balance: bool
    ) -> None:
        self.answers = answer_numbers(pairs) if balance else None
        temperature_of(temperature, torch.zeros(1), pairs[:1])  # a wrong one shows before the forwards
        self.pairs, self.wanted = pairs, temperature
        self.groups = torch.tensor(group_numbers(pairs, groups))
        self.log_odds = torch.zeros(len(pairs), dtype=torch.float64)
        self.gradients = {
            site: torch.zeros(len(pairs), *rmodels.site_shape(self.model, site), dtype=self.model.dtype)
            for site in self.sites
        }

    def add(self, batch: Sequence[EncodedPair]) -> None:
        log_odds, by_place = log_odds_and_gradients(self.model, self.sites, batch, lambda x, g: x + x * g)
        rows = torch.tensor([pair.index for pair in batch])
        for (site, layer), gradient in by_place.items():
            self._note_not_finite(gradient)
            self._count_experts(site, layer, gradient)
            self.gradients[site][rows, layer, : gradient.shape[1]] = gradient.to(self.gradients[site])
        self.log_odds[rows] = log_odds.double().cpu()

    def finish(self) -> None:
        processes.add_over_processes([self.log_odds, *self.gradients.values()])
        self.temperature = temperature_of(self.wanted, self.log_odds, self.pairs)
        slope = self.temperature.slope(self.log_odds, self.pairs).to(self.device)[:, None]
        self.balanced: dict[str, list[tuple[Tensor, Tensor]]] = {site: [] for site in self.gradients}
        for (site, name), layers in self.sums.items():
            for layer, total in enumerate(layers):
                effects = self.gradients[site][:, layer, : len(total)].to(self.device).double() * slope
                total += (effects if name == "sum" else effects.square()).sum(0)
                if self.answers is not None and name == "sum":
                    self.balanced[site].append(balanced(effects, self.answers[:, 0]))

    def stats(self, site: str) -> dict[str, Tensor]:
        kept = {"log_odds": self.log_odds, "offsets": offsets(self.temperature.answers, self.pairs)}
        kept |= {"groups": self.groups, "gradients": self.gradients[site]}
        if self.answers is not None:
            mean, error = (
                pad_sequence(rows, batch_first=True).cpu() for rows in zip(*self.balanced[site], strict=True)
            )
            kept |= {"answers": self.answers, "balanced_mean": mean, "balanced_error": error}
        return super().stats(site) | kept

    def header(self) -> dict:
        balance = {} if self.answers is None else {"balanced": True}
        wanted = {"temperature": self.wanted}
        return (
            wanted | self.temperature.header() | balance | {"spread_of_log_odds": round(float(self.log_odds.std()), 3)}
        )


def group_numbers(pairs: Sequence[Pair], groups: Sequence[str] | None) -> list[int]:
    """Number the groups of pairs in order; by default pairs of one prompt are a group."""
    names = [pair.prompt for pair in pairs] if groups is None else groups
    if len(names) != len(pairs):
        raise AUSteerError(f"groups must name one group per pair: {len(names)} names for {len(pairs)} pairs")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


TEMPERED = "causal-tempered"  # how causal momentum is called where tau is not 1
MOMENTA: dict[str, type[Momentum]] = {
    "activation": ActivationMomentum, "causal": CausalMomentum, TEMPERED: TemperedMomentum
}  # fmt: skip


def MFU_screening(
    train_dataset: Sequence[Sequence[str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None = None,
    applied_module: str = "ffn",
    *,
    protocol: str = "clean",
    momentum: str = "activation",
    temperature: str | float = FITTED,
    groups: Sequence[str] | None = None,
    balance: bool = False,
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> AURanks:
    """Rank the AUs of one site, and save the ranks if `path` is given. `train_dataset` holds [prompt, right, wrong].

    protocol: "clean", or "paper" for the authors' code, quirk by quirk (docs/fidelity.md).
    momentum: "activation" (the paper's) or "causal" (ours). temperature: of the causal objective, "fitted" or a number.
    groups: a name per pair; pairs of one group stay in one fold (by default those of one prompt).
    balance: an AU counts only if it helps whichever answer is right (causal momentum; austeer/balance.py).
    max_length: in tokens, by default the model's context.
    """
    ranks = screen(
        train_dataset,
        model,
        tokenizer,
        [applied_module],
        protocol=protocol,
        momentum=momentum_name(momentum, temperature, balance),
        temperature=temperature,
        groups=groups,
        balance=balance,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )[applied_module]
    if path is not None and processes.is_main():
        ranks.save(ranks_file(path, applied_module))
    return ranks


def momentum_name(momentum: str, temperature: str | float, balance: bool = False) -> str:
    """Return the name of a momentum in MOMENTA: at temperature 1, causal momentum needs sums only."""
    return TEMPERED if momentum == "causal" and (temperature != 1 or balance) else momentum


def screen(
    train_dataset: Sequence[Sequence[str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[str],
    *,
    protocol: str = "clean",
    momentum: str = "activation",
    temperature: str | float = FITTED,
    groups: Sequence[str] | None = None,
    balance: bool = False,
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> dict[str, AURanks]:
    """Rank several sites in one pass over the pairs. momentum: a key of MOMENTA; temperature, balance: for "causal-tempered"."""
    rules, kind = one_of(PROTOCOLS, protocol, "protocol"), one_of(MOMENTA, momentum, "momentum")
    for site in sites:
        rmodels.site_shape(model, site)
    pairs = as_pairs(train_dataset, rules.first_pairs)
    limit = longest_text(rules, rmodels.context_length(model), max_length, batch_size)
    if momentum != "activation" and (protocol == "paper" or len(pairs) < 2):
        raise AUSteerError(
            "causal momentum is not the paper's: use protocol='clean'"
            if protocol == "paper"
            else "causal momentum ranks by a t statistic, which needs at least two pairs"
        )
    if balance and momentum != TEMPERED:
        raise AUSteerError("only causal momentum can be balanced: add momentum='causal' (--momentum causal)")
    encoded, n_equal = encode(pairs, tokenizer, rules, limit)
    header = model_header(model)  # before the forwards, so that an error here comes early

    total = kind(model, sites, rules)
    total.expect(pairs, groups, temperature, balance)
    share = processes.own_share(encoded)
    batches = pair_batches(share, model.device, batch_size if rules.share_prompt else 1)
    silent = None if progress and processes.is_main() else True
    with tqdm(total=len(share), desc="screening", unit=" pairs", disable=silent) as bar:
        for batch, _ in run_halving(batches, total.add, "pairs", bar.write, "use --max-length, 4-bit, or a larger GPU"):
            bar.update(len(batch))
    processes.add_over_processes([*total.reached.values(), total.not_finite])
    not_finite = int(total.not_finite)
    if not_finite and rules.refuse_overflow:
        raise AUSteerError(
            f"{not_finite} values are inf or nan in {model.dtype}, so the ranks would be noise; "
            "load the model in bfloat16 or float32"
        )
    if not_finite:
        warnings.warn(
            f"{not_finite} activations are inf or nan in {model.dtype}; as in the authors' code they are counted",
            stacklevel=2,
        )
    total.finish()
    header |= {
        "kernel": model.config._attn_implementation,
        "tokenizer": public_name(tokenizer.name_or_path),
        "pairs": len(pairs),
        "pairs_hash": pairs_hash(pairs),
        "pairs_with_equal_tokens": n_equal,
        "not_finite": not_finite,
        "protocol": protocol,
        "momentum": momentum,
        "max_length": limit,
        "tie_rule": "lower layer, then lower dimension",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    } | total.header()
    ranks = {}
    for site in sites:
        stats = total.stats(site)
        score, gain = kind.score(stats, len(pairs))
        ranks[site] = AURanks(site, score, gain, stats, header | site_header(model, site))
        if counts := {layer: row.tolist() for (place, layer), row in total.reached.items() if place == site}:
            ranks[site].header["pairs_that_reach_each_expert"] = counts
    return ranks


if __name__ == "__main__":
    from austeer.commands.rank import main

    run_command(main)
