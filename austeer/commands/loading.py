"""Load the model that a command's options name (austeer/arguments.py: model_options and loading_options)."""

from __future__ import annotations

from argparse import Namespace

from transformers import PreTrainedModel

import rmodels


def load_model(args: Namespace, device: str | None = None) -> PreTrainedModel:
    """Load it on `device`, or else where --device says."""
    return rmodels.load(
        args.model, dtype=args.dtype, device=device or args.device, device_map=args.device_map,
        quantization=args.quantization, attn_implementation=args.attn, revision=args.revision,
        weights=args.weights, quick_proof=args.quick_proof,
    )  # fmt: skip
