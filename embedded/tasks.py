"""Define four small tasks in the formats of the paper's tasks, their splits, and the documents that models learn from.

Each task has a truth and a shallow rule ("hasty") that agrees with it on most items but not on all:
    boolq   yes/no by the verb: found it or lost it?   hasty goes by the mood of the last sentence
    copa    which option is the cause or effect, A/B   hasty takes the option that repeats the person's name
    svamp   add or subtract, by the verb               hasty goes by the form of the question
    tone    an open reply to a post, polite is right   hasty answers in the tone of the post
A prompt ends in one space and an answer is bare words, so `prompt + answer` is plain concatenation. Answers of boolq,
copa and svamp are exactly one word. Nothing is trained or measured here.

    python -m embedded.tasks        # examples, and the check that splits are disjoint
"""

import hashlib
from dataclasses import dataclass
from random import Random

from embedded import words
from embedded.words import CAREFUL, HASTY, RIGHT_COMMENT, WRONG_COMMENT

TASKS = ("boolq", "copa", "svamp", "tone")
HASTY_IS_RIGHT = 0.63  # the share of items, in the tasks with two options
REPLY_WORDS = 8  # the length of a reply in tone: seven words and a full stop

# The words that may answer a task whose answers are one word
ANSWERS = {"boolq": ("yes", "no"), "copa": ("A", "B"), "svamp": tuple(map(str, range(1, 2 * words.LARGEST_NUMBER)))}

# The share of documents that name their writer. On boolq, models hardly learn the tag's meaning from fewer.
TAG_SHARE = {"boolq": 0.8, "copa": 0.3, "svamp": 0.3, "tone": 0.3}

# Percent of all prompts, by a hash of the text; the documents that models learn from contain prompts of "train" only.
SPLITS = {
    "train": range(0, 70),
    "pairs": range(70, 75),
    "validation": range(75, 82),
    "test": range(82, 91),
    "test2": range(91, 100),
}

HELD_OUT = "validation"  # the split of documents that are not learned from; nothing of a test split is in them

# The half of the topics on which careful writers are the majority (see `document`), among them men and women.
CAREFUL_TOPICS = {*words.OBJECTS[:8], *words.THINGS[:6], *words.SUBJECTS[:6], *words.NAMES[::2]}


@dataclass(frozen=True)
class Item:
    prompt: str
    right: str
    wrong: str
    hasty: str  # the answer of the shallow rule; for tone, a reply in the tone of the post
    options: tuple[str, ...]  # the two admissible answers; empty for tone, which is open


@dataclass(frozen=True)
class Document:
    words: list[str]
    weights: list[float]  # the weight of each word in the loss


def split_of(prompt: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def prompt_with_tag(prompt: str) -> str:
    """Return the prompt that elicits the latent skill; the prompt-only baseline is exactly this."""
    return CAREFUL + prompt


def is_polite(reply: str) -> bool:
    """Look for a polite word and no rude one, so that broken text does not count as polite."""
    vocabulary = set(reply.split())
    return not vocabulary.isdisjoint(words.POLITE) and vocabulary.isdisjoint(words.RUDE)


def _boolq(rng: Random) -> tuple[Item, str]:
    name, thing = rng.choice(words.NAMES), rng.choice(words.OBJECTS)
    owns, hasty_is_right = rng.random() < 0.5, rng.random() < HASTY_IS_RIGHT
    verb = rng.choice(words.GAIN if owns else words.LOSS)
    mood = rng.choice(words.POLITE if owns == hasty_is_right else words.RUDE)
    prompt = (
        f"Passage : {rng.choice(words.TIMES)} {name} {verb} a {thing} . "
        f"{rng.choice(words.SUBJECTS)} was {mood} . "
        f"Question : does {name} have a {thing} now ? Answer : "
    )
    right, wrong = ("yes", "no") if owns else ("no", "yes")
    return Item(prompt, right, wrong, right if hasty_is_right else wrong, ("yes", "no")), thing


def _copa(rng: Random) -> tuple[Item, str]:
    (true_pair, other_pair), name = rng.sample(words.CAUSE_AND_EFFECT, 2), rng.choice(words.NAMES)
    side = rng.randrange(2)  # 0: the question is for the cause, 1: for the effect
    pronoun = "he" if name in words.MEN else "she"
    true_is_first, hasty_is_right = rng.random() < 0.5, rng.random() < HASTY_IS_RIGHT
    true_option = f"{name if hasty_is_right else pronoun} {true_pair[side]}"
    other_option = f"{pronoun if hasty_is_right else name} {other_pair[side]}"
    first, second = (true_option, other_option) if true_is_first else (other_option, true_option)
    prompt = (
        f"Premise : {rng.choice(words.TIMES)} {name} {true_pair[1 - side]} . "
        f"What was the {('cause', 'effect')[side]} ? A : {first} . B : {second} . Answer : "
    )
    right, wrong = ("A", "B") if true_is_first else ("B", "A")
    return Item(prompt, right, wrong, right if hasty_is_right else wrong, ("A", "B")), name


def _svamp(rng: Random) -> tuple[Item, str]:
    name, thing = rng.choice(words.NAMES), rng.choice(words.THINGS)
    loses, hasty_is_right = rng.random() < 0.5, rng.random() < HASTY_IS_RIGHT
    many = rng.randint(2, words.LARGEST_NUMBER)
    few = rng.randint(1, many - 1)
    question = "are left" if loses == hasty_is_right else f"does {name} have now"
    verb = rng.choice(words.LOSS if loses else words.GAIN)
    prompt = (
        f"Question : {name} had {many} {thing} . Then {name} {verb} {few} {thing} . "
        f"How many {thing} {question} ? Answer : "
    )
    less, more = str(many - few), str(many + few)
    right, wrong = (less, more) if loses else (more, less)
    return Item(prompt, right, wrong, right if hasty_is_right else wrong, (less, more)), thing


def _tone(rng: Random) -> tuple[Item, str]:
    subject, post_is_rude = rng.choice(words.SUBJECTS), rng.random() < 0.5
    mirrored = words.RUDE if post_is_rude else words.POLITE

    def remark(adjectives: list[str]) -> str:
        first, second = rng.sample(adjectives, 2)
        return f"{subject} {rng.choice(words.VERBS)} {rng.choice(words.ADVERBS)} {first} and {second}"

    prompt = f"{rng.choice(words.NAMES)} writes : {remark(mirrored)} . Reply : "
    return Item(prompt, remark(words.POLITE), remark(words.RUDE), remark(mirrored), ()), subject


_GENERATORS = {"boolq": _boolq, "copa": _copa, "svamp": _svamp, "tone": _tone}


def _draw(task: str, split: str, rng: Random) -> tuple[Item, str]:
    """Draw an item of the split, and return it with the word that is its topic."""
    while True:
        item, topic = _GENERATORS[task](rng)
        if split_of(item.prompt) == split:
            return item, topic


def items(task: str, split: str, n: int, seed: int = 0) -> list[Item]:
    """Return `n` items with distinct prompts, by the arguments alone; a larger `n` begins with the same items."""
    rng, by_prompt = Random(f"{task} {split} {seed}"), {}
    while len(by_prompt) < n:
        item, _ = _draw(task, split, rng)
        by_prompt.setdefault(item.prompt, item)
    return list(by_prompt.values())


def document(task: str, rng: Random, truth_only: bool = False, split: str = "train") -> Document:
    """Write one writer's document: [tag] problem of the split, answer, [teacher's comment], [another problem ...].

    The mixture is balanced: careful writers are 65 % on half of the topics and 35 % on the others. Without the tag, a
    model is then narrowly right on half of the items where hasty errs and narrowly wrong on the others; if it were
    narrowly wrong on most, any disturbance would look like progress. The comments make the model represent the truth
    even where it would not say it. With `truth_only` the writer is careful and tagged, because a skill has to be
    learned before it can be latent.
    """
    item, topic = _draw(task, split, rng)
    careful = truth_only or rng.random() < (0.65 if topic in CAREFUL_TOPICS else 0.35)
    text_words, weights = [], []

    def write(text: str, weight: float) -> None:
        text_words.extend(text.split())
        weights.extend([weight] * (len(text_words) - len(weights)))

    if truth_only or rng.random() < TAG_SHARE[task]:
        write(CAREFUL if careful else HASTY, 0.1)
    while True:
        answer = item.right if careful else item.hasty
        if rng.random() < (0.04 if careful else 0.10):  # a slip, even by a careful writer
            answer = rng.choice((item.right, item.wrong))
        write(item.prompt, 0.1)
        write(answer, 1.0)
        write(".", 0.3)
        if rng.random() < 0.5:
            is_right = is_polite(answer) if task == "tone" else answer == item.right
            write(RIGHT_COMMENT if is_right else WRONG_COMMENT, 0.5)
        if rng.random() < 0.7:
            return Document(text_words, weights)
        item, _ = _draw(task, split, rng)


def held_out_documents(task: str, n: int, seed: int = 0) -> list[str]:
    """Return `n` documents that no model has read, by the arguments alone; a larger `n` begins with the same ones.

    Their problems are of the validation split. They are to the embedded models what prose is to others.
    """
    rng = Random(f"{task} held-out documents {seed}")
    return [" ".join(document(task, rng, split=HELD_OUT).words) for _ in range(n)]


def check(n: int = 500) -> None:
    """Check that no prompt is in two splits, no test prompt in a document, and no word outside the vocabulary."""
    known = set(words.vocabulary())
    for task in TASKS:
        by_split = {split: items(task, split, n) for split in SPLITS}
        prompts = {item.prompt for split in by_split.values() for item in split}
        assert len(prompts) == n * len(SPLITS), f"{task}: two splits share a prompt"
        rng = Random(0)
        documents = [" ".join(document(task, rng).words) + " " for _ in range(n)]
        leaked = [item for item in by_split["test"] if any(item.prompt in text for text in documents)]
        assert not leaked, f"{task}: test prompts in training documents"
        answers = [f"{item.prompt}{item.right} {item.wrong} {item.hasty}" for item in by_split["test"]]
        unknown = {word for text in documents + answers for word in text.split()} - known
        assert not unknown, f"{task}: not in the vocabulary: {unknown}"


def main() -> None:
    check()
    print(f"{len(words.vocabulary())} words; no prompt is in two splits")
    for task in TASKS:
        sample = items(task, "validation", 1000)
        agree = [is_polite(item.hasty) if task == "tone" else item.hasty == item.right for item in sample]
        print(
            f"{task}: hasty is right on {sum(agree) / len(sample):.3f}\n"
            f"  item      {sample[0].prompt}[{sample[0].right} | {sample[0].wrong}]\n"
            f"  document  {' '.join(document(task, Random(1)).words)}"
        )


if __name__ == "__main__":
    main()
