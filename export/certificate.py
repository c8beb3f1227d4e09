"""The parity certificate: the same prompts through live steering and through the folded checkpoint.

Both run in float32 arithmetic on the weights as stored: then only the rounding of folded weights is left to differ, while
in 16 bits the rounding of every activation would cover a weak plan, and send a token to other experts. Live steering
greedily continues each prompt; then the logits of both are compared at every position of prompt and continuation, so a
difference cannot hide behind an early disagreement.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import rmodels
from errors import AUSteerError
from plan import Plan
from set_MFU import steer

PROMPTS = (
    "The capital of France is",
    "Question: is ice cold?\nAnswer:",
    "There were 12 birds on the roof and 5 flew away. How many are left?",
    "def add(a, b):\n    return",
    "She opened the letter, read it twice, and then",
    "Once upon a time",
)
NEW_TOKENS = 16
# by the dtype of the weights: allowed difference as a share of the largest logit, and wanted share of equal greedy tokens
ALLOWED = {torch.float32: (1e-5, 1.0), torch.float16: (4e-3, 0.99), torch.bfloat16: (2e-2, 0.98)}


@torch.no_grad()
def certify(original: Path, plan: Plan, folded: Path, dtype: torch.dtype) -> dict:
    """The certificate, as JSON values, for weights stored in `dtype`; an error if the two differ."""
    tokenizer, model = rmodels.load_tokenizer(original), rmodels.load(original, dtype="float32")
    with steer(model, plan, check=False) as steering:  # the checkpoint was compared with the plan before
        texts = [_continued(model, tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS]
        live = [_logits(model, text) for text in texts]
        receipt = steering.receipt()
    effect = max(_difference(_logits(model, text), logits) for text, logits in zip(texts, live, strict=True))
    del model, steering
    gc.collect()  # two models need not fit
    model = rmodels.load(folded, dtype="float32")
    ours = [_logits(model, text) for text in texts]
    difference = max(_difference(*two) for two in zip(ours, live, strict=True))
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, live, strict=True)]).float().mean().item()
    share, wanted = ALLOWED[dtype]
    allowed = share * max(float(logits.abs().max()) for logits in live)
    result = {
        "format": "austeer-certificate-1",
        "model": plan.header.get("model"),
        "weights": str(dtype).removeprefix("torch."),
        "arithmetic": "float32",
        "device": str(model.device.type),
        "prompts": list(PROMPTS),
        "positions": sum(len(logits) for logits in live),
        "max_logit_difference": difference,
        "allowed_difference": allowed,
        "greedy_agreement": agree,
        "wanted_agreement": wanted,
        "steering_moves_logits_by": effect,
        "receipt": receipt,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if not (difference <= allowed and agree >= wanted):
        raise AUSteerError(
            f"the folded checkpoint is not the steered model: logits differ by {difference:.3g} (allowed {allowed:.3g}), "
            f"greedy tokens agree on {agree:.1%} (wanted {wanted:.0%}); nothing was written"
        )
    return result


def _continued(model: PreTrainedModel, ids: Tensor) -> Tensor:
    ids = ids.to(model.device)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits[0].float().cpu()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
