"""The repository as a whole: imports flow one way, documents tell the truth, nothing unsafe."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # module -> what of this project it may import: data flows one way
    "errors": set(),
    "shared_work": {"errors"},
    "pairs": {"errors"},
    "rmodels": {"rmodels", "errors"},
    "encoding": {"pairs", "errors"},
    "ranks": {"rmodels", "errors"},
    "pair_texts": {"encoding", "errors"},
    "momentum": {"encoding", "pair_texts", "rmodels"},
    "plan": {"ranks", "errors"},
    "MFU_screening": {"encoding", "errors", "momentum", "pairs", "ranks", "rmodels", "shared_work"},
    "set_MFU": {"errors", "plan", "ranks", "rmodels"},
    "baselines": {
        "MFU_screening",
        "baselines",
        "encoding",
        "errors",
        "momentum",
        "pair_texts",
        "pairs",
        "plan",
        "ranks",
        "rmodels",
        "set_MFU",
    },
    "export": {"errors", "export", "plan", "ranks", "rmodels", "set_MFU"},
    "embedded": {"baselines", "embedded", "errors", "ranks"},
    "eval": {
        "embedded",
        "encoding",
        "errors",
        "eval",
        "pair_texts",
        "pairs",
        "ranks",
        "rmodels",
        "shared_work",
    },  # no method
    "neurosteer_tasks": {"baselines", "embedded", "errors", "eval", "pairs", "plan", "ranks", "rmodels", "set_MFU"},
    "grid_batches": {"plan", "set_MFU"},
    "engine_batches": {"errors", "eval", "export", "plan", "shared_work"},
    "restore": {
        "setting",
        "baselines",
        "cells",
        "embedded",
        "errors",
        "eval",
        "pair_texts",
        "pairs",
        "plan",
        "ranks",
        "rmodels",
        "set_MFU",
    },
    "studies": {
        "setting",
        "MFU_screening",
        "baselines",
        "cells",
        "embedded",
        "encoding",
        "errors",
        "eval",
        "momentum",
        "pair_texts",
        "pairs",
        "plan",
        "ranks",
        "rmodels",
        "set_MFU",
        "studies",
    },
    "workers": {"cells", "setting", "shared_work"},
    "paper": {
        "engine_batches",
        "setting",
        "baselines",
        "cells",
        "cluster",
        "embedded",
        "errors",
        "eval",
        "pairs",
        "paper",
        "ranks",
        "rmodels",
        "shared_work",
        "studies",
        "workers",
    },
    "setting": {"embedded", "engine_batches", "eval", "pairs", "rmodels"},
    "cells": {
        "setting",
        "engine_batches",
        "grid_batches",
        "MFU_screening",
        "baselines",
        "embedded",
        "errors",
        "eval",
        "momentum",
        "pairs",
        "plan",
        "ranks",
        "rmodels",
        "set_MFU",
        "shared_work",
    },
    "cluster": {"cells", "errors", "setting", "workers"},
}


def sources():
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    return [ROOT / name for name in names.stdout.split()]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_flow_one_way():
    for path in sources():
        unit = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if unit in ALLOWED:
            back = (set(imports(path)) & {*ALLOWED, "comparison", "main"}) - ALLOWED[unit]
            assert not back, f"{path.name} imports {back}"
    assert all((ROOT / name).exists() or (ROOT / f"{name}.py").exists() for name in ALLOWED)


def test_nothing_unsafe():
    for path in sources():
        if "tests" in path.parts:
            continue
        text = path.read_text()
        assert "pickle" not in set(imports(path)), path
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, path
        for call in re.findall(r"Auto\w+\.from_pretrained\([^()]*(?:\([^()]*\)[^()]*)*\)", text):
            assert "trust_remote_code=False" in call, (path, call)
        assert not re.search(r"trust_remote_code=True|shell=True|\bexec\(|[^.\w]eval\(", text), path


def test_porting_guide_shows_the_file_as_it_is():
    guide = (ROOT / "docs" / "porting.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.S) if "class MistralMLP" in block]
    assert code == (ROOT / "rmodels" / "modeling_mistral.py").read_text()
    assert '"mistral": ("modeling_mistral", "MistralForCausalLM")' in (ROOT / "rmodels" / "__init__.py").read_text()


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/porting.md",
        "docs/fidelity.md",
        "docs/sign.md",
        "docs/data.md",
        "docs/scoring.md",
        "docs/people.md",
        "docs/methods.md",
        "docs/scaling.md",
        "docs/statistics.md",
        "docs/serving.md",
    ],
)
def test_paths_in_documents_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:rmodels|tests|docs|benchmarks|eval|embedded)/[\w./-]+)`|\]\(([\w./-]+)\)", text)
    named += re.findall(r"`(\w+\.(?:py|sh|txt|cff))`()", text)
    assert named or document != "README.md"
    for path in [a or b for a, b in named]:
        assert (
            (ROOT / path).exists() or ((ROOT / document).parent / path).exists() or (ROOT / "rmodels" / path).exists()
        ), path


def test_readme_code_is_python():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        ast.parse(block)


def test_fidelity_names_every_switch():
    from dataclasses import fields

    from encoding import Protocol

    text = (ROOT / "docs" / "fidelity.md").read_text()
    assert all(f"`{field.name}`" in text for field in fields(Protocol) if field.name != "name")


def test_scripts_parse():
    for script in (
        "setup.sh",
        "setup-vllm.sh",
        "serve.sh",
        "reproduce.sh",
        "tests/run.sh",
        "tests/run-vllm.sh",
        "benchmarks/peers.sh",
        "benchmarks/gpu.sh",
        ".ci/run",
    ):
        subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_datasets_holds_no_code():
    """With an __init__.py this folder would shadow the Hugging Face package of the same name."""
    assert (ROOT / "datasets").is_dir() and not list((ROOT / "datasets").rglob("*.py"))


def test_the_required_top_level_is_there():
    for name in ["main.py", "reproduce.sh", "rmodels", "MFU_screening.py", "set_MFU.py", "datasets", "AU_ranks", "eval", "requirements.txt", "requirements2.txt", "tests", "README.md", "LICENSE", "CITATION.cff"]:  # fmt: skip
        assert (ROOT / name).exists(), name


def test_records_know_every_method_file():
    from eval.records import METHOD_FILES

    assert all((ROOT / name).exists() for name in METHOD_FILES)
    for package in ("rmodels", "baselines", "eval/tasks"):
        missing = {f"{package}/{file.name}" for file in (ROOT / package).glob("*.py")} - set(METHOD_FILES)
        assert not missing, f"a change of {missing} would not be another question"


def test_shipped_ranks_are_of_the_shipped_models():
    """What the README's command makes; main.py uses them only if weights and pairs are these."""
    from ranks import AURanks

    files = sorted((ROOT / "AU_ranks" / "embedded").rglob("*.safetensors"))
    assert len(files) == 16  # four tasks, two momenta, two sites
    for file in files:
        header = AURanks.load(file).header
        assert header["pairs"] == 500 and header["model"] == f"weights/{file.parts[-3]}"
        assert header["momentum"] == file.parts[-2]
