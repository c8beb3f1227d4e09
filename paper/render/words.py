"""The prose around the tables: introduction, reading guide, environment, citation."""

from __future__ import annotations

from collections import Counter

from paper.manifest import Manifest

INTRO = (
    "AUSteer (Feng et al., ICLR 2026) steers a language model by scaling a few single dimensions of its activations, called "
    "atomic units (AUs). A momentum, summed over contrastive pairs, ranks the AUs; the top k are scaled with strength alpha. "
    "This report reproduces the paper's tables and figures, compares its published rule with our causal momentum, and sets "
    "both beside controls that a method has to beat."
)
SCALES = {
    "embedded": "Every number here comes from the tiny embedded models of this repository. They say nothing about a real "
    "model, so none of the paper's numbers stand beside them.",
    "real": "Small real models on real data, on the numbers of items that docs/real/plan.md states. Every gain is taken apart, "
    "since exact match alone counts answers that only changed their form or their preference. Tests and intervals are explained "
    "below each table.",
    "small": "Two of the paper's models on one 24 GB GPU, with at most 300 items per split.",
    "paper": "All of the paper's models.",
}
KEY = (
    "Numbers are accuracies in percent with a 95 % Wilson interval, unless a table says otherwise.",
    "* differs significantly from vanilla (exact McNemar test, Holm-adjusted over the table, p < 0.05).",
    "Bold: significantly better than every other row of its column and than every draw of its controls (same test, adjusted "
    "over all such comparisons of the table).",
    "‡ the grid point was chosen on the test split, so the number is not tested. All others were chosen on validation items.",
    "Controls (random AUs, and AUs with flipped signs, with the same search) show the median and the range of their draws.",
    "Columns that are training seeds are summarised by the mean gain over vanilla with a t interval over seeds.",
    "paper: the number the paper prints, and in parentheses ours minus the paper's where both measure the same: scorer, "
    "judge, prompts, protocol and items. Below each table stand its prompts, pairs and protocol, and what differs. "
    "†: a number that the paper took from another paper.",
    "AUs: how many AUs a row changes, fewest to most over its columns and draws.",
    "Rows in italics are not in the paper. The reason for every dash stands below its table.",
)
FINDINGS_NOTE = "A place is one task at one site of one model. The p-values of a verdict are Holm-adjusted over the comparisons that it counts."
NO_FINDING = "Nothing yet: the tables behind the findings have not been run."
CITE = """@inproceedings{feng2026austeer,
  title     = {Fine-Grained Activation Steering: Steering Less, Achieving More},
  author    = {Feng, Zijian and Li, Tianjiao and Zhu, Zixiao and Zhou, Hanzhang and Qian, Junlang and Zhang, Li and
               Chua, Jia Jim Deryl and Mak, Lee Onn and Ng, Gee Wah and Mao, Kezhi},
  booktitle = {International Conference on Learning Representations},
  year      = {2026}
}"""


def head(manifest: Manifest) -> str:
    """Say which models the numbers are about, and how to make them again."""
    if manifest.dry_run:
        return "DRY RUN on tiny random checkpoints, two items per split: it shows that the code runs; it is no result."
    limit = manifest.how.get("limit")
    limited = f" At most {limit} items per split: a quick look, not a result." if limit else ""
    return f"{SCALES[manifest.scale]}{limited} To repeat it: `bash reproduce.sh --scale {manifest.scale}`."


def environment(manifest: Manifest) -> list[str]:
    """Say on which machines and libraries the records were made, and by which commits of this repository."""
    commits: dict[str, Counter] = {}
    for record in filter(None, map(manifest.record, manifest.ids)):
        known = dict(record["environment"])
        commit = known.pop("commit")[:10] + (" with local changes" if known.pop("changed", False) else "")
        where = ", ".join(f"{key} {value}" for key, value in known.items() if value)
        commits.setdefault(f"{where}, {record['device']}", Counter())[commit] += 1
    orphans = (
        f"Records in the folder that belong to no table, because other code or options made them: {manifest.orphans}."
    )
    lines = [
        f"{where}: {', '.join(f'{count} records by commit {commit}' for commit, count in sorted(counts.items()))}"
        for where, counts in sorted(commits.items())
    ]
    return [*(lines or ["Nothing was run."]), *([orphans] if manifest.orphans else [])]
