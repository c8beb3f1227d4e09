"""Which cells an edit of the code renames: the ones that the edited lines compute, and no others.

A copy of the repository is edited and hashed in one process of its own: hashes are taken from sources, not from what was
imported.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # .ci/run has them: hashing all cells once for every edit takes long

ROOT = Path(__file__).parents[1]
OWN = ("austeer", "rmodels", "eval", "experiments", "embedded", "paper", "MFU_screening.py", "set_MFU.py")
DRIVER = """
import json, sys
from pathlib import Path
import rmodels
from austeer.code_identity import code_hash
from austeer.methods.registry import METHODS
from eval.tasks.embedded import EmbeddedTask
from eval.tasks.registry import PAPER_TASKS
from experiments.cell import cell_of
from experiments.ranking import screening_roots
from experiments.run_cell import cell_code

def codes():
    llama = rmodels.family("llama")
    # one method of each file and kind: hashing takes most of the time of these tests
    kinds = {(type(method).__module__, method.momenta, method.budgeted): name for name, method in METHODS.items()}
    cells = {name: (name, METHODS[name].sites[0], EmbeddedTask, llama) for name in kinds.values()}
    cells |= {"vanilla": ("vanilla", None, EmbeddedTask, llama), "gemma2": ("published", "ffn", EmbeddedTask, rmodels.family("gemma2"))}
    cells |= {task: ("vanilla", None, PAPER_TASKS[task], llama) for task in ("boolq", "mawps")}
    return {
        name: cell_code(cell_of(model="embedded", task="svamp", method=method, site=site), task, family)
        for name, (method, site, task, family) in cells.items()
    } | {f"ranks {momentum}": code_hash(*screening_roots(momentum, llama), cut={"MFU_screening:MOMENTA"}) for momentum in ("activation", "causal")}

results = [codes()]
for edit in json.loads(sys.stdin.read()):
    before = {}
    for name, text in edit.items():
        file = Path(name)
        before[file] = file.read_text() if file.exists() else None
        file.write_text(text)
    results.append(codes())
    for file, text in before.items():
        file.unlink() if text is None else file.write_text(text)
print(json.dumps(results))
"""


def edited(file, old, new):
    text = (ROOT / file).read_text()
    assert text.count(old) >= 1, f"{file} no longer holds {old!r}"
    return {file: text.replace(old, new, 1)}


def moved():
    """`pack` of experiments/records.py moves into a file of its own."""
    records = (ROOT / "experiments" / "records.py").read_text()
    start = records.index("def pack(")
    end = records.index("\n\n\n", start)
    away = "from collections.abc import Sequence\n\n\n" + records[start:end] + "\n"
    return {
        "experiments/packing.py": away,
        "experiments/records.py": records.replace(records[start:end], "from experiments.packing import pack"),
    }


GROWTH = {
    **edited("austeer/methods/caa.py", "class CAA", "# a comment\nclass CAA"),
    **edited("austeer/methods/iti.py", '"""', '"""Say more. '),  # in a docstring
    "rmodels/modeling_other.py": (ROOT / "rmodels" / "modeling_llama.py").read_text(),
    "austeer/methods/other.py": (ROOT / "austeer" / "methods" / "all_aus.py").read_text(),
    **moved(),
    # a definition that nothing names is no part of any cell
    **edited("eval/scoring/numbers.py", "def robust_number(", "ODD = 1\n\n\ndef robust_number("),
}
EDITS = {
    "growth": GROWTH,
    "caa": edited("austeer/methods/caa.py", "(0.25, 0.5, 0.75)", "(0.25, 0.5, 0.8)"),
    "sae": edited("austeer/sae.py", "torch.isfinite(tensor).all()", "torch.isfinite(tensor).any()"),
    "screening": edited("MFU_screening.py", "encoded, n_equal = encode(", "n_equal = 0\n    encoded, n_equal = encode("),
    "causal momentum": edited("MFU_screening.py", "1e-9 * mean.abs()", "1e-8 * mean.abs()"),
    "reading of numbers": edited("eval/scoring/numbers.py", "TOLERANCE = ", "TOLERANCE = 2 * "),
    "the family": edited("rmodels/modeling_gemma2.py", 'DEFAULT_KERNEL = "eager"', 'DEFAULT_KERNEL = "sdpa"'),
    "costs": edited("experiments/costs.py", "DOCUMENTS, SHORT = ", "DOCUMENTS, SHORT = 2 * "),
    "all that is steered": edited("experiments/run_cell.py", "chosen = points[0]", "chosen = points[-1]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """By edit, the names whose code changed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in OWN:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "datasets", folder / "datasets", ignore=lambda at, names: [n for n in names if "." not in n])
    run = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        input=json.dumps(list(EDITS.values())),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    before, *after = json.loads(run.stdout)
    changed = [{name for name in before if before[name] != codes[name]} for codes in after]
    return {"all": set(before), **dict(zip(EDITS, changed, strict=True))}


def test_growth_renames_nothing(renamed):
    """Comments, docstrings, new files, moved definitions and new ones are made at once: each hashing takes seconds."""
    assert renamed["growth"] == set()


def test_a_line_of_a_method_renames_its_cells_alone(renamed):
    assert renamed["caa"] == {"caa"}
    assert renamed["sae"] == {"sta", "neurosteer"}


def test_a_line_of_screening_renames_all_that_screened(renamed):
    from austeer.methods.registry import METHODS

    screened = {name for name, method in METHODS.items() if method.momenta} & renamed["all"]
    ranks = {"ranks activation", "ranks causal"}
    assert renamed["screening"] == screened | ranks | {"gemma2"}
    causal = {
        name for name, method in METHODS.items() if any(m.startswith("causal") for m in method.momenta)
    } & renamed["all"]
    assert renamed["causal momentum"] == causal | {"ranks causal"}


def test_a_line_of_costs_renames_what_is_planned_by_them(renamed):
    from austeer.methods.registry import METHODS

    assert renamed["costs"] == {name for name, method in METHODS.items() if method.budgeted} & renamed["all"] != set()


def test_scoring_renames_the_tasks_that_use_it(renamed):
    assert renamed["reading of numbers"] == {"mawps"}


def test_a_family_renames_its_own_cells(renamed):
    assert renamed["the family"] == {"gemma2"}


def test_what_all_steered_cells_use_renames_them_all(renamed):
    unsteered = {"vanilla", "boolq", "mawps", "ranks activation", "ranks causal"}
    assert renamed["all that is steered"] == renamed["all"] - unsteered
