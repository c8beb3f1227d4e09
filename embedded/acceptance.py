"""Measure what an embedded model can do, and accept it only if it has latent skill for steering to recover.

Latent skill is the accuracy (for tone, the share of polite replies) with the careful writer's tag in front of the
prompt. Below 0.9 on validation there is nothing to recover, and the model is refused. This file trains and steers
nothing.

    python -m embedded.acceptance                                         # the shipped models
    python -m embedded.acceptance RUN ... --write embedded/seeds.json     # several runs of the recipe
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.files import write_json
from embedded import tasks
from embedded.tasks import Item

WEIGHTS = Path(__file__).parent / "weights"
REQUIRED = 0.9
BATCH = 250


@dataclass(frozen=True)
class Skill:
    """Hold shares of answers."""

    vanilla: float  # right, without the tag
    tagged: float  # right, with the careful writer's tag: the latent skill
    hasty: float  # without the tag, equal to the shallow rule's answer


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], n_words: int) -> list[str]:
    """Continue each prompt greedily by `n_words` words."""
    answers = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            max_new_tokens=n_words,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, items: list[Item]) -> Skill:
    n_words = tasks.REPLY_WORDS if task == "tone" else 1
    plain = answer(model, tokenizer, [item.prompt for item in items], n_words)
    tagged = answer(model, tokenizer, [tasks.prompt_with_tag(item.prompt) for item in items], n_words)
    right, hasty = [item.right for item in items], [item.hasty for item in items]
    if task == "tone":  # an open reply is right if it is polite, whatever its words
        plain, tagged, right, hasty = (
            [tasks.is_polite(reply) for reply in replies] for replies in (plain, tagged, right, hasty)
        )

    def agreement(answers: list, targets: list) -> float:
        return round(sum(a == b for a, b in zip(answers, targets, strict=True)) / len(items), 4)

    return Skill(agreement(plain, right), agreement(tagged, right), agreement(plain, hasty))


def latent_skill(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, n: int = 1000) -> float:
    """Return accuracy with the tag on `n` validation items; raise if it is too low to show anything."""
    skill = measure(model, tokenizer, task, tasks.items(task, "validation", n)).tagged
    if skill < REQUIRED:
        raise AUSteerError(
            f"the latent skill of this model on {task} is {skill:.3f}, below the required {REQUIRED}, so steering has "
            "nothing to recover; train another model"
        )
    return skill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of embedded.train (default: the shipped models)")
    parser.add_argument("--write", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()

    rows = []
    print(f"{'task':8}{'seed':>6}{'vanilla':>10}{'tagged':>10}{'hasty':>10}  accepted")
    for folder in args.runs or sorted(path.parent for path in WEIGHTS.glob("*/model.safetensors")):
        record = json.loads((folder / "record.json").read_text())
        task, seed = record["task"], record["seed"]
        skill = measure(*load(folder), task, tasks.items(task, "validation", 1000))
        passed = skill.tagged >= REQUIRED
        training = {key: record[key] for key in ("steps", "truth_steps", "cpu_seconds", "sha256")}
        rows.append({"task": task, "seed": seed, **asdict(skill), "passes_gate": passed, **training})
        print(
            f"{task:8}{seed:6}{skill.vanilla:10.3f}{skill.tagged:10.3f}{skill.hasty:10.3f}  {'yes' if passed else 'NO'}"
        )
    if args.write:
        write_json(args.write, {"split": "validation", "n": 1000, "runs": rows})
    if not all(row["passes_gate"] for row in rows):
        raise SystemExit("at least one model has too little latent skill to show steering")


if __name__ == "__main__":
    main()
