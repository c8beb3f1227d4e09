"""NeuroSteer's tasks: texts of two kinds to learn from, and prompts for a model to continue.

A file of texts has lines {"text": ..., "label": ...}, labels as in the data sets:
    sentiment   0 to 4 (SST-5): 3, 4 positive and 0, 1 negative; 2, neutral, is neither
    toxicity    0 to 1, the share of raters who called it toxic (Jigsaw): 0 not toxic, from 0.5 on toxic
    politeness  2 polite, 0 impolite; 1, neutral, is neither
    stance      "support" or "oppose"
    tone        the embedded model's replies, polite or rude; generated, not read
The first kind is the target, the second the source. (The released loader of SST-5 takes neutral texts for positive.)

A file of prompts has lines {"prompt": "..."} or {"prompt": {"text": "..."}}; several files are several sets, each with
results of its own. Without a file, prompts are the first 50 characters of a quarter of the texts, which methods then do
not learn from; those of toxicity are RealToxicityPrompts.

cot reads both from files of GSM8K's format, {"question": ..., "answer": "steps #### number"}: a text is the answer with
its steps or the number alone, without the question, and a prompt is "Q: question A:".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.files import read_json_lines
from embedded.tasks import items
from eval.data.fetching import hub_table
from eval.data.read import read_rows
from eval.data.rows import read_file
from eval.tasks.arithmetic import GSM8K
from eval.tasks.open_text import Toxicity

PROMPT_CHARACTERS = 50
HELD_OUT = 4  # every fourth text, by its hash


@dataclass(frozen=True)
class Behaviour:
    target: str
    source: str
    kind: Callable[[object], bool | None] = lambda label: None  # True for a target's label, False for a source's
    labels: str = ""  # the labels that are accepted, in words
    hub: dict | None = None


def _among(labels: dict) -> Callable[[object], bool | None]:
    def kind(label: object) -> bool | None:
        if isinstance(label, bool) or not isinstance(label, (int, str)) or label not in labels:
            raise ValueError(label)
        return labels[label]

    return kind


def _toxic(label: object) -> bool | None:
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        raise ValueError(label)
    return True if label == 0 else False if label >= 0.5 else None


BEHAVIOURS = {
    "sentiment": Behaviour(
        "positive",
        "negative",
        _among({0: False, 1: False, 2: None, 3: True, 4: True}),
        "0, 1, 2, 3 or 4",
        {
            "id": "SetFit/sst5",
            "split": "train",
            "revision": "e51bdcd8cd3a30da231967c1a249ba59361279a3",
            "fields": ("text", "label"),
        },
    ),
    "toxicity": Behaviour(
        "not toxic",
        "toxic",
        _toxic,
        "a number from 0 to 1",
        # a slice: of 1.8 million comments a few thousand of each kind are enough
        {"id": "google/civil_comments", "split": "train[:50000]", "revision": None, "fields": ("text", "toxicity")},
    ),
    "politeness": Behaviour("polite", "impolite", _among({0: False, 1: None, 2: True}), "0, 1 or 2"),
    "stance": Behaviour("support", "oppose", _among({"oppose": False, "support": True}), '"support" or "oppose"'),
    "cot": Behaviour("steps", "the number alone"),
    "tone": Behaviour("polite", "rude"),
}


@dataclass(frozen=True)
class Material:
    target: list[str]  # as many as of the source
    source: list[str]
    prompts: list[str]
    golds: list[str] = field(default_factory=list)  # the right answer to each prompt, where there is one
    sets: list[tuple[str, int]] = field(default_factory=list)  # name and number of the prompts of each file, in order


def material(
    task: str,
    texts: Path | None,
    prompts: Sequence[Path],
    data_dir: str | None,
    n_texts: int,
    n_prompts: int,
    tone_split: str = "test",
) -> Material:
    """Return at most n_texts texts of each kind and n_prompts prompts of each file, in the order of the files."""
    if n_texts < 1 or n_prompts < 1:
        raise AUSteerError("at least one text of each kind and one prompt are needed (--n-texts, --n-prompts)")
    if task == "tone":
        if texts or prompts:
            raise AUSteerError("the task tone generates its own texts and prompts; leave --texts and --prompts out")
        replies = items("tone", "pairs", n_texts)
        beginnings = [item.prompt for item in items("tone", tone_split, n_prompts)]
        return Material([i.prompt + i.right for i in replies], [i.prompt + i.wrong for i in replies], beginnings)
    if task == "cot":
        return _worked_answers(texts, prompts, data_dir, n_texts, n_prompts)
    behaviour = BEHAVIOURS[task]
    labelled = _labelled(task, texts)
    sets = []
    if prompts:
        by_file = [(path.stem, [_prompt(row, place) for place, row in _lines(path)][:n_prompts]) for path in prompts]
        sets = _sets(by_file)
        beginnings = [line for _, lines in by_file for line in lines]
    elif task == "toxicity":
        beginnings = [row["prompt"] for row in read_rows(Toxicity, "test", data_dir)][:n_prompts]
    else:
        held_out = sorted(
            {text for text, _ in labelled if _digest(text)[0] % HELD_OUT == 0}, key=_digest
        )  # neutral too
        labelled = [(text, kind) for text, kind in labelled if _digest(text)[0] % HELD_OUT]
        beginnings = [text[:PROMPT_CHARACTERS].rstrip() for text in held_out][:n_prompts]
    target, source = ([text for text, kind in labelled if kind is side] for side in (True, False))
    n = min(len(target), len(source), n_texts)  # the released code takes equal numbers too
    if not n or not beginnings:
        raise AUSteerError(
            f"{task} has {len(target)} {behaviour.target} texts, {len(source)} {behaviour.source} ones and {len(beginnings)} "
            "prompts: all three are needed"
        )
    return Material(target[:n], source[:n], beginnings, sets=sets)


def _worked_answers(
    texts: Path | None, prompts: Sequence[Path], data_dir: str | None, n_texts: int, n_prompts: int
) -> Material:
    """Return texts and prompts of GSM8K: its training answers, and the questions of its test split."""

    def rows(path: Path | None, split: str) -> list[dict]:
        return read_rows(GSM8K, split, data_dir) if path is None else read_file(GSM8K, split, path)

    def number(row: dict) -> str:
        return row["answer"].rpartition("####")[2].strip()

    learned = rows(texts, "train")[:n_texts]
    by_file = [rows(path, "test")[:n_prompts] for path in prompts or [None]]
    asked = [row for part in by_file for row in part]
    return Material(
        [row["answer"] for row in learned],
        [number(row) for row in learned],
        [f"Q: {row['question']}\nA:" for row in asked],
        [number(row) for row in asked],
        _sets([(path.stem, part) for path, part in zip(prompts, by_file, strict=False)]),
    )


def _sets(by_file: Sequence[tuple[str, Sequence]]) -> list[tuple[str, int]]:
    """Return the name and the number of prompts of each file; refuse a file without any, which has no results."""
    if empty := [name for name, prompts in by_file if not prompts]:
        raise AUSteerError(f"--prompts: 0 prompts in {', '.join(empty)}; every file needs at least one")
    return [(name, len(prompts)) for name, prompts in by_file]


def _labelled(task: str, path: Path | None) -> list[tuple[str, bool | None]]:
    behaviour = BEHAVIOURS[task]
    labelled = []
    for place, row in _lines(path) if path is not None else _hub(task):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not text.strip():
            raise AUSteerError(f'{place}: "text" must be a text that is not empty')
        try:
            labelled.append((text, behaviour.kind(label)))
        except ValueError:
            raise AUSteerError(f'{place}: "label" is {label!r}; for {task} it is {behaviour.labels}') from None
    return labelled


def _prompt(row: dict, place: str) -> str:
    prompt = row.get("prompt")
    text = prompt.get("text") if isinstance(prompt, dict) else prompt
    if not isinstance(text, str) or not text.strip():
        raise AUSteerError(f'{place}: "prompt" must be a text, or an object with a "text", that is not empty')
    return text


def _lines(path: Path) -> Iterable[tuple[str, dict]]:
    for number, row in read_json_lines(path):
        place = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise AUSteerError(f"{place}: not a JSON object")
        yield place, row


def _hub(task: str) -> Iterable[tuple[str, dict]]:
    source = BEHAVIOURS[task].hub
    if source is None:
        raise AUSteerError(f'{task} has no known home on the hub: give --texts, lines {{"text": ..., "label": ...}}')
    try:
        table = hub_table(source)
    except AUSteerError as error:
        raise AUSteerError(f"{error}; give --texts FILE instead") from None
    text, label = source["fields"]
    return ((f"{source['id']}, row {at}", {"text": row[text], "label": row[label]}) for at, row in enumerate(table, 1))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def texts_hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
