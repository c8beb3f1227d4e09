"""What steering costs a bench's model: neutral text, Fisher information, and meters of KL, each made once and kept.

neutral text          of real models a file, WikiText-2 or the project's prose (austeer/neutral.py); of embedded models
                      documents of their own generator that they have not read, since prose is <unk> to them
Fisher information    a file per site beside the model's ranks, used again where weights, text and code are the same
meters                of KL on the part of the neutral text that corrects strengths, on the part that reports what they
                      cost, on prompts of the task, and on the model's own continuations
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from austeer.change import Change
from austeer.code_identity import code_hash
from austeer.evidence import Costs
from austeer.files import read_tensors, write_tensors
from austeer.fisher import Fisher, measure_fisher, predicted_kl, why_unpriced
from austeer.forward import input_device
from austeer.identity import model_header
from austeer.kl import KLMeter
from austeer.neutral import LENGTH, NeutralText, from_passages, lead_of, neutral_text
from austeer.plan import Plan
from embedded.tasks import held_out_documents
from eval.answering.answerer import encode_prompts
from experiments.bench import Bench
from rmodels import code_roots

DOCUMENTS, SHORT = 9000, 32  # of an embedded model: how many are drawn, and how many tokens of each make a passage
MORE = 2  # times the neutral text of real models, for the embedded ones: it costs seconds
PROMPTS = 32  # of the task, each its last LENGTH tokens
CONTINUED = 16  # passages whose first half the model continues
TEXTS = "austeer-texts-1"


def costs_of(bench: Bench) -> Costs:
    return Costs(partial(neutral_of, bench), partial(fisher_of, bench), partial(meter_of, bench, "measure"))


def neutral_of(bench: Bench) -> NeutralText:
    if "neutral" not in bench.kept:
        bench.kept["neutral"] = _neutral_text(bench)
    return bench.kept["neutral"]


def _neutral_text(bench: Bench) -> NeutralText:
    if not bench.model_spec.embedded:
        return neutral_text(bench.tokenizer, bench.task_spec.neutral, bench.task_spec.data_dir)
    documents = held_out_documents(bench.task_spec.name, DOCUMENTS)
    return from_passages("held-out documents", bench.tokenizer(documents)["input_ids"], SHORT, MORE)


def fisher_of(bench: Bench, sites: Sequence[str]) -> Fisher:
    """Return the Fisher information of these sites together. Sites without a file are measured in one pass."""
    missing = [site for site in sites if ("fisher", site) not in bench.kept and not _load_fisher(bench, site)]
    if missing:
        measured = measure_fisher(bench.model, missing, neutral_of(bench), progress=not bench.model_spec.embedded)
        measured.header |= {"code": _fisher_code(bench), "kernel": bench.model.config._attn_implementation}
        for site in missing:
            bench.kept["fisher", site] = one = measured.only([site])
            one.save(_file(bench, site))
    return Fisher.pooled([bench.kept["fisher", site] for site in sites])


def _load_fisher(bench: Bench, site: str) -> bool:
    file = _file(bench, site)
    if not file.exists():
        return False
    fisher = Fisher.load(file)
    wanted = _origin(bench) | {"code": _fisher_code(bench), "kernel": bench.model.config._attn_implementation}
    fits = all(fisher.header.get(key) == value for key, value in wanted.items())
    if fits:
        bench.kept["fisher", site] = fisher
    return fits


def _fisher_code(bench: Bench) -> str:
    return code_hash(measure_fisher, *code_roots(type(bench.model)))


def _origin(bench: Bench) -> dict:
    header = model_header(bench.model)
    return {key: header[key] for key in ("fingerprint", "precision")} | {"neutral_hash": neutral_of(bench).hash}


def _file(bench: Bench, name: str):
    return bench.store.costs_file(bench.model_spec, bench.task_spec, neutral_of(bench).hash, name)


def predicted_cost(bench: Bench, change: Change) -> dict:
    """Return the KL that is predicted for a change, and where there is none the reason."""
    reason = (
        why_unpriced(change)
        if isinstance(change, Plan)
        else "it is an adapter, and the Fisher information is that of gates"
    )
    predicted = None if reason else predicted_kl(change, fisher_of(bench, change.sites))
    return {"predicted": predicted, "unpriced": reason}


def cost_of_prompts(bench: Bench, plain: str, changed: str) -> dict:
    """Return the KL on the neutral text of what stands in front of a changed prompt, such as an instruction."""
    found = {"text": neutral_of(bench).name, "measured": None}
    if not changed.endswith(plain):
        return found | {"unpriced": "what was added does not stand in front of the prompt"}
    front = bench.tokenizer(changed.removesuffix(plain), add_special_tokens=False)["input_ids"]
    return found | {"measured": meter_of(bench, "measure").of_front(front, len(lead_of(bench.tokenizer)))}


def meter_of(bench: Bench, text: str) -> KLMeter:
    """Return the KL meter for one kind of text.

    text: "measure" or "report", a part of the neutral text; "prompts", the task's; "own", what the model itself continues.
    """
    if ("meter", text) not in bench.kept:
        bench.kept["meter", text] = KLMeter(bench.model, _texts(bench, text))
    return bench.kept["meter", text]


def _texts(bench: Bench, text: str) -> Sequence[Tensor]:
    if text in ("measure", "report"):
        return list(neutral_of(bench).part(text))
    if text == "own":
        return list(_own_continuations(bench))
    prompts = [item.prompt for item in bench.task.test[:PROMPTS]]
    return [torch.tensor(ids) for ids in encode_prompts(bench.tokenizer, prompts, LENGTH) if len(ids) > 1]


def _own_continuations(bench: Bench) -> Tensor:
    """Return passages whose second half the unsteered model has written itself, sampled once and kept in a file."""
    file, wanted = _file(bench, "own-continuations"), {key: str(value) for key, value in _origin(bench).items()}
    if file.exists():
        tensors, metadata = read_tensors(file, TEXTS, "texts")
        if all(metadata.get(key) == value for key, value in wanted.items()):
            return tensors["passages"]
    passages = neutral_of(bench).part("measure")[:CONTINUED]
    written = sampled(bench.model, passages[:, : passages.shape[1] // 2], passages.shape[1])
    write_tensors(file, {"passages": written}, {"format": TEXTS, **wanted})
    return written


@torch.inference_mode()
def sampled(model, beginnings: Tensor, length: int, seed: int = 0) -> Tensor:
    """Continue beginnings to `length` tokens, drawn from the model's own distribution."""
    device, more = input_device(model), length - beginnings.shape[1]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(
            beginnings.to(device), attention_mask=torch.ones_like(beginnings).to(device), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, min_new_tokens=more, max_new_tokens=more,
            pad_token_id=0,  # never used: all rows are of one length, and none may end early
        )  # fmt: skip
    return written.cpu()
