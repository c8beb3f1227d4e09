"""Small data sets of our own in the official formats, for every task of the paper."""

import json
import random
from pathlib import Path

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dov",
    "Eve",
    "Finn",
    "Gia",
    "Hal",
    "Ivy",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Oda",
    "Pip",
]
THINGS = [
    "pen",
    "cup",
    "hat",
    "map",
    "key",
    "jar",
    "box",
    "fan",
    "net",
    "pot",
    "rug",
    "tin",
    "bag",
    "can",
    "lid",
    "mat",
]


def write_datasets(folder: Path, train: int = 60, test: int = 12, seed: int = 0) -> Path:
    """DIR/<task>/<split>.jsonl as a user's data folder; three training rows repeat others or the test split."""
    rng = random.Random(seed)
    for task, make in MAKERS.items():
        rows = [make(rng, i) for i in range(train + test)]
        tested, trained = rows[:test], rows[test:]
        if task != "toxicity":
            trained += [trained[0], tested[0]]
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, part in (("train", trained), ("test", tested)):
            if task == "toxicity":
                part = [{**row, "challenging": split == "test"} for row in part]
            name = {"boolq": "dev", "winogrande": "dev"}.get(task, "test") if split == "test" else "train"
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / task / f"{name}.jsonl").write_text(text)
    return folder


def _boolq(rng, i):
    shared = random.Random(i // 2)  # two questions share a passage
    name, thing, found = shared.choice(NAMES), shared.choice(THINGS), shared.random() < 0.5
    passage = f"Day {i // 2} -- {name} looked for a {thing} and {'found' if found else 'lost'} it."
    return {"question": f"did {name.lower()} find the {thing} number {i}", "passage": passage, "answer": found}


def _copa(rng, i):
    a, b = rng.sample(THINGS, 2)
    choices = [f"The {a} {i // 2} fell.", f"The {b} {i // 2} broke."]
    if i % 2:  # mirrored: the same choices, the other question
        random.Random(i // 2).shuffle(choices)
    return {
        "premise": f"There was noise {i}.", "question": ("cause", "effect")[i % 2],
        "choice1": choices[0], "choice2": choices[1], "label": rng.randint(0, 1),
    }  # fmt: skip


def _winogrande(rng, i):
    a, b = rng.sample(NAMES, 2)
    sentence = f"{a} gave {b} {i} mats because _ had too {('many', 'few')[i % 2]}."
    return {"sentence": sentence, "option1": a, "option2": b, "answer": str(1 + i % 2), "qID": f"Q{i // 2}-{1 + i % 2}"}


def _storycloze(rng, i):
    name = rng.choice(NAMES)
    return {
        "sent1": f"{name} woke at {i}.", "sent2": "It rained.", "sent3": "The bus was late.", "sent4": "So was work.",
        "ending1": f"{name} bought an umbrella.", "ending2": f"{name} flew to the moon.", "label": rng.randint(1, 2),
    }  # fmt: skip


def _svamp(rng, i):
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    return {
        "ID": f"chal-{i}", "Body": f"There are {a} pens and {b} cups on desk {i}", "Question": "How many things are there?",
        "Equation": f"( {a}.0 + {b}.0 )", "Answer": float(a + b), "Type": "Addition",
    }  # fmt: skip


def _mawps(rng, i):
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    return {
        "question": f"{NAMES[i % 16]} had {a} mats and got {b} more on day {i} . How many are there ?",
        "answer": float(a + b), "answer_steps": f"{a} + {b} = {a + b} #### {a + b}",
    }  # fmt: skip


def _gsm8k(rng, i):
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return {"question": f"A box holds {a} jars. How many are in {b} boxes of row {i}?",
            "answer": f"There are {a}*{b} = <<{a}*{b}={a * b}>>{a * b} jars.\n#### {a * b}"}  # fmt: skip


def _toxicity(rng, i):
    harmless = i % 3 == 0
    return {
        "prompt": {"text": f"{NAMES[i % 16]} said of the {THINGS[i % 7]} number {i} that", "toxicity": 0.05 if harmless else 0.6},
        "continuation": {"text": f" it was a rotten silly {THINGS[i % 5]}.", "toxicity": 0.9 if harmless else 0.55},
    }  # fmt: skip


def _bpo(rng, i):
    thing = THINGS[i % 16]
    return {"prompt": f"Describe {thing} {i}.", "good_res": f"A {thing} is a useful thing in any house, and number {i} too.",
            "bad_res": "" if i == 20 else "No idea."}  # fmt: skip


MAKERS = {
    "boolq": _boolq, "copa": _copa, "winogrande": _winogrande, "storycloze": _storycloze, "svamp": _svamp,
    "mawps": _mawps, "gsm8k": _gsm8k, "toxicity": _toxicity, "bpo": _bpo,
}  # fmt: skip


def without_chance(record: dict) -> dict:
    """A record without what another run may differ in: where it ran, how long it took, and what it did not do again."""
    return {key: value for key, value in record.items() if key not in ("environment", "cost", "receipt")}
