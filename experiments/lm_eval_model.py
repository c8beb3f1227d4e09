"""Run lm-evaluation-harness on a steered model, with every option and table of its own command line.

python main.py lm-eval --model M --plan calm.safetensors --tasks arc_easy --limit 200
python main.py lm-eval --model M --tasks my_task --include_path FOLDER        without a plan: the unsteered model

What this command does not know it hands on to `lm-eval run`, whose model is then `austeer`: the patched model with the plans
set on it. A folded checkpoint needs none of this (`lm-eval run --model hf --model_args pretrained=FOLDED`), nor does a PEFT
adapter (`pretrained=M,peft=ADAPTER`); all three give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import rmodels
from austeer import arguments
from austeer.errors import AUSteerError, run_command
from austeer.plan import Plan
from austeer.steering import apply
from experiments.restoration.measures import check_lm_eval

NAME = "austeer"


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the command on to lm-eval, with the steered model."""
    args, rest = _arguments(argv)
    check_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    register()
    for path in args.plan:
        Plan.load(path)  # a file that is no plan is refused before the model is loaded
    given = {"pretrained": args.model, "weights": args.weights, "dtype": args.dtype, "plans": args.plan,
             "quick_proof": args.quick_proof}  # fmt: skip
    device = ["--device", rmodels.check_device(args.device)]
    sys.argv = [
        "lm-eval",
        "run",
        "--model",
        NAME,
        "--model_args",
        json.dumps(given),
        *device,
        "--tasks",
        *args.tasks,
        *rest,
    ]
    sys.argv += ["--limit", args.limit] if args.limit else []
    cli_evaluate()


def register() -> None:
    """Make the model `austeer` known to lm-eval. Its arguments: pretrained, plans, weights, dtype, device, quick_proof."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(NAME)
    class SteeredLM(HFLM):
        def __init__(self, pretrained: str, plans: Sequence[str] = (), weights: str | None = None, dtype: str = "auto",
                     device: str | None = None, quick_proof: bool = False, batch_size: int | str = 1, **others):  # fmt: skip
            model = rmodels.load(pretrained, dtype=dtype, device=device, weights=weights, quick_proof=quick_proof)
            tokenizer = rmodels.load_tokenizer(pretrained, weights=weights)
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **others)
            self.steering = _steered(model, plans)

        def _model_call(self, *inputs, **named):
            return self._checked(super()._model_call(*inputs, **named))

        def _model_generate(self, *inputs, **named):
            return self._checked(super()._model_generate(*inputs, **named))

        def _checked(self, output):
            """Return the output, or raise if the plan overflowed: inf and nan must not be scored."""
            if self.steering is not None:
                self.steering.check()
            return output


def _steered(model, plans: Sequence[str]):
    """Set the sum of the plans on a model; return None without plans."""
    if not plans:
        return None
    plan, *others = map(Plan.load, plans)
    for other in others:
        plan = plan + other
    if plan.tokens != "all":
        raise AUSteerError(
            f"this plan steers {plan.tokens} tokens, but lm-eval does not tell the model where a prompt ends: make the plan for all tokens"
        )
    return apply(model, plan)


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = arguments.parser("main.py lm-eval", __doc__, parents=[arguments.model_options()], allow_abbrev=False)
    add = parser.add_argument
    add("--plan", nargs="+", default=[], metavar="FILE", help="plan files; several add up")
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="tasks of lm-eval, or of --include_path; `lm-eval ls tasks` lists them",
    )
    add("--limit", help="use at most so many items of each task, for a quick look")
    args, rest = parser.parse_known_args(argv)
    for option in ("--model_args", "-a", "-M", "--config", "--trust_remote_code"):
        if any(one.partition("=")[0] == option for one in rest):
            raise AUSteerError(f"leave out {option}: it would replace the steered model")
    return args, rest


if __name__ == "__main__":
    run_command(main)
