"""Save a restored model: RestoreLCC's plan only shifts the inputs of o_proj, so it can become the bias of o_proj.

Most checkpoints have no such bias. Where the architecture supports one (`attention_bias` in the config: Llama,
Gemma-2, Qwen3), it is switched on, and all biases that come with it are zero before the plan is folded in.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer.errors import AUSteerError
from austeer.export.fold import fold
from austeer.files import check_new
from austeer.identity import model_header
from austeer.plan import Plan


def save_restored(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, out: str | Path) -> dict:
    """Write the model with the plan folded in to the new folder `out`, an ordinary checkpoint; return its certificate."""
    check_new(out)
    check_savable(model)
    wide = _with_bias(model)
    plan = replace(plan, header={**plan.header, **model_header(wide)})
    beside = Path(out).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pruned.", dir=beside) as folder:
        wide.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return fold(folder, plan, out)


def check_savable(model: PreTrainedModel) -> None:
    """Refuse a model whose architecture has no bias in o_proj: cheap, and better said before the training than after it."""
    if not _has_bias(model) and not _has_bias(_empty_with_bias(model)):
        raise AUSteerError(
            f"a restored {model.config.model_type} model cannot be saved: its architecture has no bias in o_proj to hold "
            "what RestoreLCC adds; use a Llama, Gemma-2 or Qwen3 model, or steer the pruned model by the plan"
        )


def _has_bias(model: PreTrainedModel) -> bool:
    return all(linear.bias for _, inside, _, linear in rmodels.linear_maps(model) if inside == "attention")


def _empty_with_bias(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same architecture without weights, with the biases switched on that its config knows."""
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    return rmodels.skeleton(config)


def _with_bias(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose o_proj has a bias: this one, or one with the same weights and biases of zero.

    The result is to be saved, not run: its buffers, which checkpoints do not hold, are not filled in.
    """
    if _has_bias(model):
        return model
    wide = _empty_with_bias(model)
    wide.generation_config = model.generation_config  # a config alone does not know the checkpoint's own
    weights = model.state_dict()
    zeros = {
        name: torch.zeros(tensor.shape, dtype=model.dtype, device=model.device)
        for name, tensor in wide.state_dict().items()
        if name not in weights
    }
    wide.load_state_dict(weights | zeros, assign=True)
    return wide
