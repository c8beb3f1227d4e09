"""lm-evaluation-harness on steered models: the command, and live, folded and PEFT giving the same likelihoods."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from austeer.errors import AUSteerError
from austeer.plan import Plan
from austeer.steering import steer
from experiments import lm_eval_model

MODEL = str(Path(__file__).parents[1] / "embedded" / "weights" / "copa")


@pytest.fixture
def plan() -> Plan:
    return Plan({"attention": torch.randn(4, 128, generator=torch.Generator().manual_seed(0))}, {})


@pytest.fixture
def harness(monkeypatch):
    """Stand in for lm-eval: a registry, an HFLM that calls its model, and a command line that notes its arguments."""
    seen = {"models": {}}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size, **others):
            self.model, seen["others"] = pretrained, others

        def _model_call(self, ids):
            return self.model(ids).logits

        _model_generate = _model_call

    def register_model(name):
        return lambda cls: seen["models"].update({name: cls})

    modules = {
        "lm_eval": SimpleNamespace(__spec__=object()),
        "lm_eval.__main__": SimpleNamespace(cli_evaluate=lambda: seen.update(argv=sys.argv)),
        "lm_eval.api": SimpleNamespace(),
        "lm_eval.api.registry": SimpleNamespace(register_model=register_model),
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=HFLM),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    return seen


def test_the_command_hands_on_what_it_does_not_know(harness, plan, tmp_path):
    plan.save(tmp_path / "p.safetensors")
    lm_eval_model.main(
        [
            "--model",
            MODEL,
            "--device",
            "cpu",
            "--plan",
            str(tmp_path / "p.safetensors"),
            "--tasks",
            "arc_easy",
            "--limit",
            "5",
        ]
    )
    argv = harness["argv"]
    assert argv[:4] == ["lm-eval", "run", "--model", "austeer"] and argv[-4:] == ["--tasks", "arc_easy", "--limit", "5"]
    given = json.loads(argv[argv.index("--model_args") + 1])
    assert given["pretrained"] == MODEL and given["plans"] == [str(tmp_path / "p.safetensors")]


def test_its_model_is_steered_by_the_sum_of_the_plans(harness, plan, tmp_path):
    half = Plan({"attention": plan.scales["attention"] / 2}, {})
    half.save(tmp_path / "half.safetensors")
    lm_eval_model.register()
    made = harness["models"]["austeer"]
    ids = torch.arange(4, 12)[None]
    plain = made(MODEL, device="cpu")
    with steer(plain.model, plan):
        wanted = plain._model_call(ids)
    steered = made(MODEL, plans=[str(tmp_path / "half.safetensors")] * 2, device="cpu", max_length=64)
    assert torch.allclose(steered._model_call(ids), wanted, atol=1e-5)
    assert not torch.allclose(plain._model_call(ids), wanted, atol=0.1) and harness["others"] == {"max_length": 64}


def test_overflow_is_not_scored(harness, tmp_path):
    Plan({"attention": torch.full((4, 128), 3e38)}, {}).save(tmp_path / "p.safetensors")
    lm_eval_model.register()
    model = harness["models"]["austeer"](MODEL, plans=[str(tmp_path / "p.safetensors")], device="cpu")
    for call in (model._model_call, model._model_generate):
        with pytest.raises(AUSteerError, match="inf or nan"):
            call(torch.arange(4, 12)[None])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "t", "--model_args", "pretrained=x"], "leave out --model_args"),
        (["--tasks", "t", "--plan", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_wrong_options_are_told_in_a_line(harness, options, message):
    with pytest.raises(AUSteerError, match=message):
        lm_eval_model.main(["--model", MODEL, *options])


def test_a_plan_for_some_tokens_is_refused(harness, plan, tmp_path):
    Plan(plan.scales, {}, "generated").save(tmp_path / "p.safetensors")
    lm_eval_model.register()
    with pytest.raises(AUSteerError, match="make the plan for all tokens"):
        harness["models"]["austeer"](MODEL, plans=[str(tmp_path / "p.safetensors")], device="cpu")


TASK = """
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: [" yes", " no"]
metric_list: [{{metric: acc}}]
"""


def test_live_folded_and_peft_have_the_same_likelihoods(plan, tmp_path):
    """Run lm-eval itself on a task of our own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from austeer.export.checkpoint import Checkpoint
    from austeer.export.fold import fold
    from austeer.export.lora import save_lora

    items = [{"question": f"Is {n} even?", "label": n % 2} for n in range(12)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parity.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    plan.save(tmp_path / "p.safetensors")
    fold(MODEL, plan, tmp_path / "folded", certificate=False)
    save_lora(Checkpoint(MODEL), plan, tmp_path / "lora")
    lm_eval_model.register()
    ways = {
        "live": ("austeer", {"pretrained": MODEL, "plans": [str(tmp_path / "p.safetensors")]}),
        "folded": ("hf", {"pretrained": str(tmp_path / "folded")}),
        "peft": ("hf", {"pretrained": MODEL, "peft": str(tmp_path / "lora")}),
        "plain": ("austeer", {"pretrained": MODEL}),
    }
    accuracy, likelihoods = {}, {}
    for name, (model, given) in ways.items():
        found = simple_evaluate(model, given, tasks=["parity"], device="cpu", bootstrap_iters=0,
                                task_manager=TaskManager(include_path=str(tmp_path / "tasks")))  # fmt: skip
        accuracy[name] = found["results"]["parity"]["acc,none"]
        likelihoods[name] = torch.tensor(
            [[float(one[0]) for one in sample["filtered_resps"]] for sample in found["samples"]["parity"]]
        )
    assert accuracy["live"] == accuracy["folded"] == accuracy["peft"]
    for name in ("folded", "peft"):
        assert torch.allclose(likelihoods[name], likelihoods["live"], rtol=0, atol=1e-4), name
    assert (likelihoods["plain"] - likelihoods["live"]).abs().max() > 0.1
