"""The data of a restoration: pairs to train on, text to calibrate pruning on, and text whose perplexity is measured.

By default all three come from the task. Files take their place: instructions in Alpaca's form (instruction, input,
output; a JSON array or JSON Lines) and plain text, or JSON Lines with a column `text` or `passage`. With the preset
`original` files are looked for in the data folder, and the task is then only tested on.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.files import read_json_lines, read_text
from austeer.methods.base import ORIGINAL
from austeer.pairs import Pair, pairs_hash, read_columns
from eval.data.read import DATASETS, find_folder
from eval.data.similar import general_pairs
from experiments.bench import Bench
from rmodels import context_length

INSTRUCTIONS = 2000  # trained on, as many as the authors' file has
HELD_OUT_INSTRUCTIONS = 200  # at most; grid points are chosen by the loss of their answers
HELD_OUT_PROMPTS = 500  # of test items, whose perplexity is measured
WINDOW = 2048  # tokens of a piece of text, or as many as the model takes
CALIBRATION_WINDOWS = 128
HELD_OUT_TOKENS = 2**19  # of a text whose perplexity is measured; WikiText-2's test has fewer

# what the preset `original` takes if no file is named: (names of its folder, names of its file), in order of preference
PLACES = {
    "instructions": [(("alpaca", "stanford_alpaca"), ("alpaca_data.json", "train.jsonl"))],
    "calibration": [(("c4",), ("train.jsonl", "train.txt")), (("boolq",), ("train.jsonl",))],
    "text": [(("wikitext2", "wikitext-2", "wikitext-2-raw-v1"), ("wiki.test.raw", "test.txt", "test.jsonl")),
             (("boolq",), ("dev.jsonl",))],
}  # fmt: skip
WANTED = {
    "instructions": "instructions in Alpaca's form",
    "calibration": "general text to calibrate on",
    "text": "text to measure perplexity on",
}


@dataclass(frozen=True)
class Material:
    pairs: list[Pair]
    pairs_by: str  # how their wrong answers were made
    held_out: list[Pair]  # chooses grid points in place of the task's validation items; may be empty
    calibration: list[list[int]]
    calibrated_on: str
    text: list[list[int]]
    text_name: str

    def key(self) -> dict:
        """Return everything here that determines results, as part of a record's key."""
        return {
            "pairs_hash": pairs_hash(self.pairs),
            "pairs_by": self.pairs_by,
            "held_out_hash": pairs_hash(self.held_out),
            "calibration_hash": _hash(self.calibration),
            "text": self.text_name,
            "text_hash": _hash(self.text),
        }


def find_files(files: dict[str, str | None], preset: str, data_dir: str | None) -> dict[str, Path | None]:
    """Return a file for each kind: the named one, or with preset `original` one found in the data folder."""
    return {
        kind: Path(path) if path else _find(kind, data_dir) if preset == ORIGINAL else None
        for kind, path in files.items()
    }


def gather(bench: Bench, files: dict[str, Path | None]) -> Material:
    """Read the files, and take the task's own data where there is no file."""
    task, tokenizer, limit = bench.task, bench.tokenizer, bench.task_spec.limit
    longest = context_length(bench.model)

    def tokens(prompts) -> list[list[int]]:
        return [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]

    pairs, by, held_out = task.pairs, task.pairs_by, []
    if files["instructions"]:
        pairs, held_out, by = instruction_pairs(files["instructions"], bench.task_spec.pairs.encoder)
    if files["calibration"]:
        ids = windows(tokenizer, general_text(files["calibration"]), longest)
        calibration = random.Random(0).sample(ids, min(CALIBRATION_WINDOWS, len(ids)))
        calibrated_on = _name(files["calibration"])
    else:
        calibration = [ids[-longest:] for ids in tokens(pair.prompt for pair in pairs)]
        calibrated_on = "prompts of the training pairs"
    if files["text"]:
        ids = windows(tokenizer, general_text(files["text"]), longest)
        text = ids[: limit or max(1, HELD_OUT_TOKENS // len(ids[0]))]
        text_name = _name(files["text"])
    else:
        prompts = dict.fromkeys(item.prompt for item in task.test)
        text = [ids[:longest] for ids in tokens(list(prompts)[:HELD_OUT_PROMPTS])]
        text_name = "held-out prompts"
    return Material(pairs, by, held_out, calibration, calibrated_on, text, text_name)


def instruction_pairs(path: Path, encoder: str | None) -> tuple[list[Pair], list[Pair], str]:
    """Return pairs to train on, pairs held out (the last tenth, at most 200), and how wrong answers were made.

    As in the authors' code the wrong answer is the most similar one to another instruction.
    """
    rows = [row for row in read_columns(path, ("instruction", "input", "output")) if row[0].strip() and row[2].strip()]
    held_out = min(HELD_OUT_INSTRUCTIONS, len(rows) // 10)
    if held_out < 2:
        raise AUSteerError(f"{path} has {len(rows)} instructions with an answer; at least 20 are needed")
    asked = [Pair(_prompt(instruction, given), output, "") for instruction, given, output in rows]
    train, by = general_pairs(asked[:-held_out][:INSTRUCTIONS], encoder)
    return train, general_pairs(asked[-held_out:], encoder)[0], by


def _prompt(instruction: str, given: str) -> str:
    parts = {"Instruction": instruction, "Input": given} if given.strip() else {"Instruction": instruction}
    return "".join(f"### {name}:\n{text}\n\n" for name, text in parts.items()) + "### Response:\n"


def general_text(path: Path) -> str:
    """Return the text of a file. From JSON Lines, join the distinct values of the column `text` or `passage`."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        text = read_text(path)
    else:
        texts: dict[str, None] = {}
        for line, row in read_json_lines(path):
            value = (row.get("text") or row.get("passage")) if isinstance(row, dict) else None
            if not isinstance(value, str):
                raise AUSteerError(f"{path}, line {line}: there is no text in a column `text` or `passage`")
            texts[value] = None
        text = "\n\n".join(texts)
    if not text.strip():
        raise AUSteerError(f"{path} holds no text")
    return text


def windows(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> list[list[int]]:
    """Cut a text into windows of equal length in tokens, dropping the rest at its end. A shorter text is one window."""
    ids, width = tokenizer(text, verbose=False)["input_ids"], min(WINDOW, longest)
    return [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)] or [ids]


def _find(kind: str, data_dir: str | None) -> Path:
    for place in filter(None, (data_dir, DATASETS)):
        for (name, *others), files in PLACES[kind]:
            folder = find_folder({"folders": others}, name, Path(place))
            for file in files if folder else ():
                if (folder / file).exists():
                    return folder / file
    first_folder, first_file = (names[0] for names in PLACES[kind][0])
    raise AUSteerError(
        f"preset original needs {WANTED[kind]}: give --{kind} FILE, or put {first_folder}/{first_file} into the data folder"
    )


def _name(path: Path) -> str:
    return f"{path.absolute().parent.name}/{path.name}"


def _hash(texts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
