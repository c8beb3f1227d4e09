"""Prove that a folded checkpoint is the steered model: the parity certificate, in three parts.

    algebra    the original in float32 gives the same logits steered live as with the plan hot-patched into its weights
    file       every tensor of the folded checkpoint is the patched one, rounded to its stored dtype, bit for bit
    rounding   how far the folded checkpoint's logits are from live steering's, for what the stored numbers cannot hold

The first two together prove the fold in any dtype; rounding comes with the dtype, and is refused only where it would
drown the plan. All arithmetic is float32: in 16 bits the rounding of every activation would hide a weak plan, and
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
from austeer.export.weights import Edit
from austeer.plan import Plan
from austeer.steering import steer
from rmodels.memory import TooLittleMemory

PROMPTS = (
    "The capital of France is",
    "Question: is ice cold?\nAnswer:",
    "There were 12 birds on the roof and 5 flew away. How many are left?",
    "def add(a, b):\n    return",
    "She opened the letter, read it twice, and then",
    "Once upon a time",
)
NEW_TOKENS = 16
# float32 sums run in another order, and strong steering amplifies that. Logits may differ by these shares of the
# largest logit and of how far steering moves them, or by LEAST (measured: 7e-6 at scales of 1, 3e-4 at scales of 90)
OF_LARGEST, OF_EFFECT, LEAST = 1e-5, 1e-4, 1e-4
ROUNDING = 0.5  # a share of how far steering moves the logits


@torch.no_grad()
def certify(
    original: Checkpoint, plan: Plan, result: Checkpoint, tokenizer: PreTrainedTokenizerBase, quick_proof: bool = False
) -> dict:
    """Return the certificate as JSON values; raise if the result is not the original under the plan."""
    edits = [piece for edit in original.edits(plan) for piece in original.in_files(edit)]
    model = _load(original, quick_proof)
    with steer(model, plan, check=False) as steering:  # the caller has compared plan and checkpoint
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
    gc.collect()  # one model at a time has to fit in memory
    model = _load(result, quick_proof)
    result_logits = [_logits(model, text) for text in texts]
    rounding = _difference(result_logits, live)
    agreement = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(result_logits, live, strict=True)])
    weights = " and ".join(sorted({str(result.dtype(edit.weight)).removeprefix("torch.") for edit in edits}))
    # below the algebra's own tolerance nothing can be said about rounding
    if not rounding < max(ROUNDING * effect, allowed):
        raise AUSteerError(
            f"{weights} cannot hold this plan: rounding its weights moves logits by {rounding:.3g}, and steering by "
            f"{effect:.3g}; raise alpha, use a float32 checkpoint, or steer live. Nothing was written"
        )
    return {
        "format": "austeer-certificate-2",
        "model": plan.header.get("model"),
        "fingerprint": plan.header.get("fingerprint"),  # the original's: the plan was compared with it
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
            "greedy_agreement": agreement.float().mean().item(),
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _load(checkpoint: Checkpoint, quick_proof: bool) -> PreTrainedModel:
    try:
        return rmodels.load(checkpoint.folder, dtype="float32", quick_proof=quick_proof)
    except TooLittleMemory as error:
        raise AUSteerError(f"{error.lack}, as the certificate needs them; --no-certificate folds without") from None


def _check_file(patched: PreTrainedModel, edits: list[Edit], original: Checkpoint, result: Checkpoint) -> int:
    """Check that stored tensors are the patched ones, rounded, or the original's where the plan changes nothing."""
    changed = {name for edit in edits for name in (edit.weight, edit.bias) if name}
    wrong = [] if result.shapes == original.shapes else ["its table of contents"]
    for name in set(original.shapes) - changed:
        wrong += [] if torch.equal(result.read_bytes(name), original.read_bytes(name)) else [name]
    maps = {linear for *_, linear in rmodels.linear_maps(patched)}  # what plans can change
    for name in sorted({name for linear in maps for name in (linear.weight, linear.bias) if name}):
        stored, weight = result.as_loaded(name), patched.get_parameter(name)
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
