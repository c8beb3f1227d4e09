"""What single AUs truly do: the log-odds of pairs with one AU's gate changed, by forwards from its layer on.

Alone, an AU is scaled in the unsteered model. Within a plan, all other gates are set while its own differs: what it
adds there may be another thing, since AUs interact. First order says the same of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.batching import grouped
from austeer.forward import PairTexts, tapped
from austeer.from_layer import LayerOutput, keeping_before, repeated, starting_at
from austeer.objective import Gates, Objective
from austeer.tokens import EncodedPair
from rmodels.gate import AUGate

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16384}  # a forward without gradients: rows times their length
ALIKE = 2  # tokens by which the prompts of a batch may differ
SAME = 1e-4  # nats by which a run from a layer on may differ from a whole one


def log_odds_of_changes(
    objective: Objective, site: str, layer: int, changes: Sequence[tuple[int, float]], plan: Gates | None = None
) -> tuple[Tensor, Tensor]:
    """Return M of every pair without the changes, (pairs,), and with each of them, (changes, pairs), float64.

    changes: AUs of this site and layer with what is added to their gates. plan: gates that are set all the while.
    """
    model, plan = objective.model, plan or {}
    row = {pair.index: number for number, pair in enumerate(objective.encoded)}
    before = torch.zeros(len(objective), dtype=torch.float64)
    after = torch.zeros(len(changes), len(objective), dtype=torch.float64)
    room = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cuda"])
    by_prompt = sorted(objective.encoded, key=lambda pair: (len(pair.prefix), pair.length))
    batches = grouped(by_prompt, lambda batch: _fits(batch, room))
    for batch in batches:
        columns = [row[pair.index] for pair in batch]
        with keeping_before(model, layer) as kept:
            before[columns] = _log_odds(model, batch, site, layer, [(0, 0.0)], plan, 0, None)[0]
        start = kept[0] if kept and _starts(model, batch, site, layer, kept[0], plan, before[columns]) else None
        at_once = max(1, room // (2 * len(batch) * max(pair.length for pair in batch)))
        for first in range(0, len(changes), at_once):
            some = changes[first : first + at_once]
            after[first : first + len(some), columns] = _log_odds(model, batch, site, layer, some, plan, layer, start)
    return before, after


def _fits(batch: list[EncodedPair], room: int) -> bool:
    """Say whether pairs run together: prompts of about one length, since logits begin where the shortest one ends."""
    alike = len(batch[-1].prefix) - len(batch[0].prefix) <= ALIKE
    return alike and 2 * len(batch) * max(pair.length for pair in batch) <= room


def _starts(
    model: PreTrainedModel,
    batch: list[EncodedPair],
    site: str,
    layer: int,
    kept: LayerOutput,
    plan: Gates,
    whole: Tensor,
) -> bool:
    """Say whether a run from the layer on equals a whole one: not where later layers read what earlier ones left."""
    try:
        again = _log_odds(model, batch, site, layer, [(0, 0.0)], plan, layer, kept)[0]
    except (KeyError, IndexError, AttributeError, TypeError):  # what they left is not there at all
        return False
    return bool((again - whole).abs().max() <= SAME)


@torch.inference_mode()
def _log_odds(
    model: PreTrainedModel,
    batch: list[EncodedPair],
    site: str,
    layer: int,
    changes: Sequence[tuple[int, float]],
    plan: Gates,
    start: int,
    kept: LayerOutput | None,
) -> Tensor:
    """Return M of a batch under each change, (changes, pairs): one forward, whose rows are the changes' texts."""
    texts = 2 * len(batch)

    def scale(gate: AUGate):
        here = gate.site == site and gate.layer == layer
        rows = torch.zeros(len(changes) if here else 1, gate.width)
        if gate.site in plan:
            rows += plan[gate.site][gate.layer, : gate.width]
        if here:
            rows[range(len(changes)), [dim for dim, _ in changes]] += torch.tensor([dose for _, dose in changes])
        if not rows.any():
            return None
        rows = (rows.repeat_interleave(texts, 0) if here else rows)[:, None]
        return lambda x: x + x * gate.align(rows.to(x))

    start_from = None if kept is None else repeated(kept, len(changes))
    with starting_at(model, start, start_from), tapped(model, sorted({site, *plan}), scale):
        log_odds = PairTexts(model, batch * len(changes), logits=True, whole=True).log_odds()
    return log_odds.double().cpu().view(len(changes), len(batch))
