"""Make, show and save the contrastive pairs of a task of the paper, or of data of your own.

python main.py pairs svamp --data-dir DIR                        a task of the paper (appendix B.1)
python main.py pairs mine.csv --prompt-field q --answer-field a  your questions and right answers: the most
                                                                 similar other answer is the wrong one (Table 5)
python main.py pairs hub:openai/gsm8k:main:train --prompt-field question --answer-field answer
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from austeer.errors import AUSteerError, run_command
from austeer.pairs import Pair, read_columns, write_pairs
from austeer.tokens import PROTOCOLS
from eval.data.general_pairs import different
from eval.data.similar import Similarity
from eval.scoring.numbers import TOLERANCE, robust_number
from eval.tasks.registry import PAPER_TASKS, paper_task


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    if args.source in PAPER_TASKS:
        task = paper_task(args.source, "embedded", data_dir=args.data_dir, protocol=args.protocol, encoder=args.encoder)
        pairs, dropped = task.pairs, task.dropped
        print(f"{args.source}, {args.protocol} protocol; prompts: {task.wording}")
    else:
        pairs, dropped, how = own_pairs(
            args.source, args.prompt_field, args.answer_field, args.wrong_field, args.encoder, args.numbers
        )
        print(f"{args.source}; {how}")
    for pair in pairs[: args.show]:
        print("\n" + "\n".join(f"  {name:<9}{text!r}" for name, text in zip(Pair._fields, pair, strict=True)))
    print(f"\n{len(pairs)} pairs" + "".join(f"\n  dropped {n}: {why}" for why, n in dropped.items() if n))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_pairs(args.out, pairs)
        print(f"written: {args.out}")


def own_pairs(
    source: str, prompt: str, answer: str, wrong: str | None, encoder: str | None, numbers: bool
) -> tuple[list[Pair], Counter[str], str]:
    """Pairs of any table of questions and right answers, why rows were dropped, and how wrong answers were found."""
    fields = [prompt, answer, *([wrong] if wrong else [])]
    rows = _hub_rows(source, fields) if source.startswith("hub:") else read_columns(source, fields)
    dropped: Counter[str] = Counter()
    whole = [row for row in rows if all(text.strip() for text in row)]
    dropped["an empty field"], rows = len(rows) - len(whole), whole
    if wrong:
        found, how = [row[2] for row in rows], f"wrong answers: the field {wrong}"
    else:
        similarity, answers = Similarity(encoder), [row[1] for row in rows]
        if numbers:
            values = [robust_number(text) for text in answers]
            values = [float("nan") if value is None else value for value in values]
            nearest = similarity.nearest_different(answers, values, TOLERANCE)
        else:
            nearest = different(similarity, answers)
        found = [None if other is None else answers[other] for other in nearest]
        kind = "with another number" if numbers else "that differs"
        how = f"wrong answers: the most similar answer {kind}, by {similarity.name}"
    pairs = []
    for row, other in zip(rows, found, strict=True):
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
    """hub:ID[:CONFIG[:SPLIT]]"""
    from datasets import load_dataset  # takes a second, and only hub data need it

    _, name, *rest = source.split(":")
    config, split = [*rest, "", ""][:2]
    try:
        table = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # what the hub library raises is open-ended
        raise AUSteerError(f"{source} could not be loaded: {str(error).splitlines()[0][:150]}") from None
    missing = [field for field in fields if field not in table.column_names]
    if missing:
        raise AUSteerError(f"{source} has no field {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return list(zip(*(map(str, table[field]) for field in fields), strict=True))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="TASK|FILE|hub:ID[:CONFIG[:SPLIT]]", help=f"{', '.join(PAPER_TASKS)}, or your data")
    add("--data-dir", help="folder of the paper's datasets (default: datasets/, then the hub)")
    add("--protocol", default="clean", choices=PROTOCOLS, help="of the paper's tasks (default: %(default)s)")
    add("--prompt-field", default="prompt", help="of your data (default: %(default)s)")
    add("--answer-field", default="answer", help="of your data: the right answer (default: %(default)s)")
    add("--wrong-field", help="of your data: a wrong answer, where there is one")
    add("--numbers", action="store_true", help="answers of your data are numbers: a wrong one must differ in value")
    add("--encoder", help="sentence encoder, or tfidf (default: all-MiniLM-L6-v2)")
    add("--show", type=int, default=3, help="print this many (default: %(default)s)")
    add("--out", type=Path, help="save the pairs here (.jsonl)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
