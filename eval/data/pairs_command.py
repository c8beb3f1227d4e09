"""Make, show and save the contrastive pairs of a task of the paper, or of data of your own.

python main.py pairs svamp --data-dir DIR                        a task of the paper (appendix B.1)
python main.py pairs mine.csv --prompt-field q --answer-field a  your questions and right answers: the wrong answer is
                                                                 the most similar other one (Table 5)
python main.py pairs hub:openai/gsm8k:main:train --prompt-field question --answer-field answer
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from austeer import arguments
from austeer.errors import AUSteerError, run_command
from austeer.pairs import Pair, read_columns, write_pairs
from austeer.tokens import PROTOCOLS
from eval.data.fetching import hub_table
from eval.data.similar import Similarity, nearest_in_other_words
from eval.scoring.numbers import TOLERANCE, robust_number
from eval.tasks.registry import PAPER_TASKS, paper_task


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if args.source in PAPER_TASKS:
        names = ("data_dir", "protocol", "encoder", "swapped_choices", "n_pairs", "pairs_draw")
        options = {name: getattr(args, name) for name in names}
        task = paper_task(args.source, toxicity="embedded", **options)
        pairs, groups, dropped = task.pairs, task.groups, task.dropped
        print(f"{args.source}, {args.protocol} protocol; prompts: {task.wording}")
    else:
        groups = None
        pairs, dropped, how = own_pairs(
            args.source, args.prompt_field, args.answer_field, args.wrong_field, args.encoder, args.numbers
        )
        print(f"{args.source}; {how}")
    for pair in pairs[: args.show]:
        print("\n" + "\n".join(f"  {name:<9}{text!r}" for name, text in zip(Pair._fields, pair, strict=True)))
    print(f"\n{len(pairs)} pairs" + "".join(f"\n  dropped {n}: {why}" for why, n in dropped.items() if n))
    if args.out:
        write_pairs(args.out, pairs, groups)
        print(f"written: {args.out}")


def own_pairs(
    source: str, prompt: str, answer: str, wrong: str | None, encoder: str | None, numbers: bool
) -> tuple[list[Pair], Counter[str], str]:
    """Return pairs of a table of questions and right answers, the rows dropped by reason, and how wrong answers were made."""
    fields = [prompt, answer, *([wrong] if wrong else [])]
    rows = _hub_rows(source, fields) if source.startswith("hub:") else read_columns(source, fields)
    dropped: Counter[str] = Counter()
    whole = [row for row in rows if all(text.strip() for text in row)]
    dropped["an empty field"], rows = len(rows) - len(whole), whole
    if wrong:
        others, how = [row[2] for row in rows], f"wrong answers: the field {wrong}"
    else:
        similarity, answers = Similarity(encoder), [row[1] for row in rows]
        if numbers:
            values = [robust_number(text) for text in answers]
            values = [float("nan") if value is None else value for value in values]
            nearest = similarity.nearest_different(answers, values, TOLERANCE)
        else:
            nearest = nearest_in_other_words(similarity, answers)
        others = [None if other is None else answers[other] for other in nearest]
        kind = "with another number" if numbers else "that differs"
        how = f"wrong answers: the most similar answer {kind}, by {similarity.name}"
    pairs = []
    for row, other in zip(rows, others, strict=True):
        if other is None:
            dropped["no different answer in the pool"] += 1
        elif other.strip() == row[1].strip():
            dropped["equal answers"] += 1
        else:
            pairs.append(Pair(row[0], row[1], other))
    if not pairs:
        raise AUSteerError(
            f"{source}: no pair could be made; " + ", ".join(f"{n} {why}" for why, n in dropped.items() if n)
        )
    return pairs, dropped, how


def _hub_rows(source: str, fields: Sequence[str]) -> list[tuple[str, ...]]:
    """Read the fields of a data set that is named as hub:ID[:CONFIG[:SPLIT]]."""
    _, name, *rest = source.split(":")
    config, split = [*rest, "", ""][:2]
    table = hub_table({"id": name, "config": config or None, "split": split or "train"})
    missing = [field for field in fields if field not in table.column_names]
    if missing:
        raise AUSteerError(f"{source} has no field {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return list(zip(*(map(str, table[field]) for field in fields), strict=True))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.parser("main.py pairs", __doc__)
    add = parser.add_argument
    add("source", metavar="TASK|FILE|hub:ID[:CONFIG[:SPLIT]]", help=f"{', '.join(PAPER_TASKS)}, or your data")
    add("--data-dir", help="folder of the paper's data sets (default: datasets/, then the hub)")
    add("--protocol", default="clean", choices=PROTOCOLS, help="protocol of the paper's tasks (default: %(default)s)")
    add("--prompt-field", default="prompt", help="field of the prompt in your data (default: %(default)s)")
    add("--answer-field", default="answer", help="field of the right answer in your data (default: %(default)s)")
    add("--wrong-field", help="field of a wrong answer in your data, if it has one")
    add("--numbers", action="store_true", help="compare your answers as numbers: a wrong one must differ in value")
    add("--n-pairs", type=int, help="use only the first N pairs of a task, or N random ones with --pairs-draw")
    add(
        "--pairs-draw",
        type=int,
        metavar="SEED",
        help="draw them at random by this seed, whole groups of what belongs together",
    )
    add("--swapped-choices", action="store_true", help="make a second pair of every item of copa, its choices swapped")
    add("--encoder", help="sentence encoder, or tfidf (default: all-MiniLM-L6-v2)")
    add("--show", type=int, default=3, help="print this many (default: %(default)s)")
    add("--out", type=Path, help="save the pairs here (.jsonl)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
