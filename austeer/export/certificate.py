"""The parity certificate: that a folded checkpoint is the steered model, in three parts.

    algebra    the original in float32, steered live and with the plan hot-patched into its weights: the same logits.
    file       every tensor of the folded checkpoint is that patched one, rounded to the dtype it is stored in, to the bit.
    rounding   what the stored numbers cannot hold: how far the folded checkpoint's logits are from live steering's.

Together the first two prove the fold, whatever the dtype; rounding belongs to it, and is refused only where it would
drown the plan. All arithmetic is float32: in 16 bits the rounding of every activation would cover a weak plan, and
send tokens to other experts. Live steering greedily continues each prompt; then logits are compared at every position
of prompt and continuation, so a difference cannot hide behind an early disagreement.
"""

from __future__ import annotations

import gc

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer.errors import AUSteerError
from austeer.export.checkpoint import Checkpoint
from austeer.export.hot_patch import folded
from austeer.export.weights import Edit, find_edits
from austeer.plan import Plan
from austeer.steering import steer

PROMPTS = (
    "The capital of France is",
    "Question: is ice cold?\nAnswer:",
    "There were 12 birds on the roof and 5 flew away. How many are left?",
    "def add(a, b):\n    return",
    "She opened the letter, read it twice, and then",
    "Once upon a time",
)
NEW_TOKENS = 16
# float32 sums in another order, and strong steering makes that larger. Logits may differ by shares of the largest and
# of how far steering moves them, or by so much where that is more (measured: 7e-6 at scales of 1, 3e-4 at scales of 90)
OF_LARGEST, OF_EFFECT, LEAST = 1e-5, 1e-4, 1e-4
ROUNDING = 0.5  # of how far steering moves the logits


@torch.no_grad()
def certify(original: Checkpoint, plan: Plan, result: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The certificate, as JSON values; an error if the result is not the original under the plan."""
    edits = find_edits(plan, original.shapes)
    model = rmodels.load(original.folder, dtype="float32")
    with steer(model, plan, check=False) as steering:  # the checkpoint was compared with the plan before
        texts = [_continued(model, tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS]
        live = [_logits(model, text) for text in texts]
        receipt = steering.receipt()
    effect = _difference([_logits(model, text) for text in texts], live)
    with folded(model, plan, check=False):
        algebra = _difference([_logits(model, text) for text in texts], live)
        largest = max(float(logits.abs().max()) for logits in live)
        allowed = max(LEAST, OF_LARGEST * largest + OF_EFFECT * effect)
        if not algebra <= allowed:
            raise AUSteerError(
                "the plan in the weights is not the plan live: in float32 logits differ by "
                f"{algebra:.3g} (allowed {allowed:.3g}); nothing was written"
            )
        tensors = _check_file(model, edits, original, result)
    device = model.device.type
    del model, steering
    gc.collect()  # two models need not fit
    model = rmodels.load(result.folder, dtype="float32")
    ours = [_logits(model, text) for text in texts]
    rounding = _difference(ours, live)
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, live, strict=True)]).float().mean().item()
    stored = {str(result.dtype(edit.weight)).removeprefix("torch.") for edit in edits}
    weights = " and ".join(sorted(stored))
    # below what is allowed to the algebra nothing can be told of rounding
    if not rounding < max(ROUNDING * effect, allowed):
        raise AUSteerError(
            f"{weights} cannot hold this plan: rounding its weights moves logits by {rounding:.3g}, and steering by "
            f"{effect:.3g}; raise alpha, use a float32 checkpoint, or steer live. Nothing was written"
        )
    return {
        "format": "austeer-certificate-2",
        "model": plan.header.get("model"),
        "fingerprint": plan.header.get("fingerprint"),  # of the original, which was compared with it
        "weights": weights,
        "arithmetic": "float32",
        "device": device,
        "prompts": list(PROMPTS),
        "positions": sum(len(logits) for logits in live),
        "receipt": receipt,
        "steering_moves_logits_by": effect,
        "algebra": {"max_logit_difference": algebra, "allowed": allowed},
        "file": {"tensors_compared": tensors},
        "rounding": {
            "max_logit_difference": rounding,
            "allowed": max(ROUNDING * effect, allowed),
            "greedy_agreement": agree,
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _check_file(patched: PreTrainedModel, edits: list[Edit], original: Checkpoint, result: Checkpoint) -> int:
    """Stored tensors that the plan names are the patched ones, rounded, and all others the original's, bit for bit."""
    changed = {name for edit in edits for name in (edit.weight, edit.bias) if name}
    wrong = [] if result.shapes == original.shapes else ["its table of contents"]
    for name in set(original.shapes) - changed:
        wrong += [] if torch.equal(result.read_bytes(name), original.read_bytes(name)) else [name]
    for name, weight in patched.state_dict().items():
        if "o_proj" in name or "down_proj" in name:  # what plans can change, named as a model's: experts are fused
            stored = result.as_loaded(name)
            wrong += [] if torch.equal(stored, weight.to(stored.dtype).cpu()) else [name]
    if wrong:
        raise AUSteerError(
            f"the folded checkpoint is not the steered model: {min(wrong)} differs ({len(wrong)} in all); "
            "nothing was written"
        )
    return len(original.shapes)


def _continued(model: PreTrainedModel, ids: Tensor) -> Tensor:
    ids = ids.to(model.device)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits[0].float().cpu()


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
