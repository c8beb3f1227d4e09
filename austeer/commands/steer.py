"""The command that shows what a plan does: `austeer steer` answers each prompt without it and with it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

import rmodels
from austeer import arguments
from austeer.commands.loading import load_model
from austeer.errors import AUSteerError, first_line, missing_extra
from austeer.export.command import read_plan
from austeer.files import read_text
from austeer.forward import input_device
from austeer.steering import steer


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = _arguments(argv, prog)
    logging.set_verbosity_error()  # a checkpoint may set sampling options, which greedy decoding leaves unused
    plan = read_plan(args)
    model = load_model(args)
    tokenizer = rmodels.load_tokenizer(args.model, revision=args.revision, weights=args.weights)
    if args.chat and not getattr(tokenizer, "chat_template", None):
        raise AUSteerError("this tokenizer has no chat template; leave --chat out, or use an instruction-tuned model")
    image = (
        ImagePrompt(args.image, rmodels.load_processor(args.model, revision=args.revision, weights=args.weights))
        if args.image
        else None
    )
    if not args.json:
        print(f"plan: {plan.summary()}\n")
    for prompt in _prompts(args):
        inputs = image.inputs(prompt) if image else text_inputs(tokenizer, prompt, args.chat)
        unsteered = greedy_answer(model, tokenizer, inputs, args.max_new_tokens)
        with steer(model, plan):
            steered = greedy_answer(model, tokenizer, inputs, args.max_new_tokens)
        if args.json:
            line = {"prompt": prompt, "unsteered": unsteered, "steered": steered}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(f"> {prompt}\n{side_by_side(unsteered, steered)}\n", flush=True)


def text_inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> dict[str, Tensor]:
    """Return what the model reads. chat: the prompt is a user's turn."""
    if chat:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {
        name: inputs[name] for name in ("input_ids", "attention_mask")
    }  # some add token types, which few models take


class ImagePrompt:
    """Put an image before every prompt, in the way of the checkpoint's processor."""

    def __init__(self, file: str, processor: ProcessorMixin):
        if find_spec("PIL") is None:
            raise missing_extra("pillow", "images")
        from PIL import Image

        self.processor = processor
        try:
            self.image = Image.open(file).convert("RGB")
        except OSError as error:
            raise AUSteerError(f"cannot read the image {file}: {first_line(error)}") from error

    def inputs(self, prompt: str) -> BatchFeature:
        if getattr(self.processor, "chat_template", None):
            parts = [{"type": "image", "image": self.image}, {"type": "text", "text": prompt}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
        mark = getattr(self.processor, "boi_token", None) or self.processor.image_token
        return self.processor(text=mark + prompt, images=self.image, return_tensors="pt")


@torch.inference_mode()
def greedy_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Tensor], new_tokens: int
) -> str:
    """Return how the model, steered or not, continues the inputs."""
    inputs = {name: values.to(input_device(model)) for name, values in inputs.items()}
    inputs |= {name: values.to(model.dtype) for name, values in inputs.items() if values.is_floating_point()}
    end = model.generation_config.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=new_tokens, pad_token_id=padding,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
    )  # fmt: skip
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def side_by_side(unsteered: str, steered: str) -> str:
    """Lay two texts out as two columns, as wide as the terminal allows."""
    width = (shutil.get_terminal_size().columns - 3) // 2
    columns = [
        [title, "-" * width, *(part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""])]
        for title, text in (("unsteered", unsteered), ("steered", steered))
    ]
    return "\n".join(f"{left:<{width}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    lines = args.prompt or (read_text(Path(args.file)).splitlines() if args.file else sys.stdin)
    yield from (line.rstrip("\n") for line in lines if line.strip())


def _arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Answer prompts greedily without and with a plan, side by side.",
        parents=[arguments.model_options(), arguments.loading_options(), arguments.plan_options()],
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts (default: standard input, one per line)")
    source.add_argument("--file", help="file with one prompt per line")
    add = parser.add_argument
    add("--chat", action="store_true", help="ask in the model's chat format")
    add("--image", metavar="FILE", help="an image before every prompt, for vision-language models")
    add("--max-new-tokens", type=int, default=64, help="length of an answer (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object per prompt instead of columns")
    args = parser.parse_args(argv)
    arguments.check_plan_options(args)
    if args.max_new_tokens < 1:
        raise AUSteerError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    return args
