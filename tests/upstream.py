"""The checkpoints of conftest.py as models: with gates, or upstream's with the same weights."""

import torch
from transformers import AutoModelForCausalLM

import rmodels

# of two lengths, as token ids
TEXTS = [[1, *(7 * i % 300 + 3 for i in range(start, start + length))] for start, length in ((0, 20), (5, 20), (9, 31))]


def load(checkpoints, name, dtype="float32"):
    return rmodels.load(checkpoints[name], dtype=dtype, device="cpu")


def upstream(checkpoints, model, dtype=torch.float32):
    """Return upstream's unpatched model with this model's weights and kernel."""
    kernel = model.config._attn_implementation.removeprefix("au_")
    result = AutoModelForCausalLM.from_pretrained(
        checkpoints[model.config.model_type], dtype=dtype, attn_implementation=kernel, trust_remote_code=False
    )
    result.load_state_dict(model.state_dict())
    return result.eval().requires_grad_(False)
