"""The repository as a whole: imports flow one way, documents tell the truth, nothing unsafe."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("austeer", "rmodels", "MFU_screening", "set_MFU", "embedded", "eval", "experiments", "paper", "main")
# What a part may reach, by whatever way: data flows one way. The longest prefix of a module's name decides.
MAY_REACH = {
    "austeer.errors": (),
    "rmodels": ("austeer.errors",),
    "austeer": ("rmodels",),
    "MFU_screening": ("austeer", "rmodels"),
    "set_MFU": ("austeer", "rmodels"),
    "austeer.commands": ("austeer", "austeer.methods", "austeer.export", "rmodels", "MFU_screening", "set_MFU"),
    "austeer.methods": ("austeer", "rmodels", "MFU_screening", "set_MFU"),
    "austeer.export": ("austeer", "rmodels", "MFU_screening", "set_MFU"),
    "embedded": ("austeer", "rmodels"),
    "eval": ("austeer", "rmodels", "embedded"),
    "experiments": ("austeer", "austeer.methods", "austeer.export", "rmodels", "MFU_screening", "set_MFU", "embedded", "eval"),
    "paper": ("austeer", "austeer.methods", "austeer.export", "rmodels", "MFU_screening", "set_MFU", "embedded", "eval", "experiments"),
}  # fmt: skip


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


def modules_imported(path, known):
    tree = ast.parse(path.read_text())
    # what runs only as a script is no arrow between modules
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in known)


def part_of(module):
    return max((part for part in MAY_REACH if f"{module}.".startswith(f"{part}.")), key=len)


def test_imports_flow_one_way():
    known = {}
    for path in sources():
        names = path.relative_to(ROOT).with_suffix("").parts
        if names[0] in OWN and names[0] != "main":
            known[".".join(names).removesuffix(".__init__")] = path
    direct = {module: set(modules_imported(path, known)) for module, path in known.items()}
    for module in known:
        reached, queue = set(), [module]
        while queue:
            new = direct[queue.pop()] - reached
            reached |= new
            queue += new
        allowed = {part_of(module), *MAY_REACH[part_of(module)]}
        back = {one for one in reached if part_of(one) not in allowed | {"austeer.errors"}}
        assert not back, f"{module} reaches {sorted(back)}"


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
        "docs/tasks.md",
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

    from austeer.tokens import Protocol

    text = (ROOT / "docs" / "fidelity.md").read_text()
    assert all(f"`{field.name}`" in text for field in fields(Protocol) if field.name != "name")


def test_scripts_parse():
    for script in (
        "scripts/setup.sh",
        "scripts/setup-vllm.sh",
        "scripts/serve.sh",
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


def test_shipped_ranks_are_of_the_shipped_models():
    """What the README's command makes; main.py uses them only if weights and pairs are these."""
    from austeer.ranks import AURanks

    files = sorted((ROOT / "AU_ranks" / "embedded").rglob("*.safetensors"))
    assert len(files) == 16  # four tasks, two momenta, two sites
    for file in files:
        header = AURanks.load(file).header
        assert header["pairs"] == 500 and header["model"] == f"weights/{file.parts[-3]}"
        assert header["momentum"] == file.parts[-2]
