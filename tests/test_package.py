"""The installed package: what the wheel holds, and that it ranks, steers and exports far from the checkout."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PAIRS

import austeer
import rmodels
from austeer.errors import AUSteerError
from austeer.export.gguf_lora import save_gguf_lora
from austeer.export.serve import main as serve
from austeer.pairs import Pair, write_pairs
from austeer.sae import from_sae_lens
from experiments.restoration.measures import zero_shot

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("*.py", "*py.typed", "austeer/prose.*", "pyproject.toml", "README.md", "LICENSE")
# what tells where modules come from must not leak in, nor a checkout's pytest settings
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def attempt(*command, **more):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, **more)


def run(*command, **more):
    done = attempt(*command, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from copies: building leaves folders behind, and finds those of an earlier build."""
    copies, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-co", "--exclude-standard", *BUILT_FROM, cwd=ROOT).split():
        (copies / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copies / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copies)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("far from the checkout")
    write_pairs(folder / "pairs.jsonl", [Pair(*pair) for pair in PAIRS])
    return folder


def test_the_wheel_holds_what_steers_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"austeer", "rmodels", "MFU_screening.py", "set_MFU.py"}
    modules = {str(file.relative_to(ROOT)) for part in ("austeer", "rmodels") for file in (ROOT / part).rglob("*.py")}
    data = {"austeer/py.typed", "rmodels/py.typed", "austeer/prose.txt", "austeer/prose.md"}
    assert modules | data <= set(names)
    assert wheel.name == f"austeer-{version_in_pyproject()}-py3-none-any.whl"


def version_in_pyproject():
    (line,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = ")]
    return line.split('"')[1]


IN_ONE_PROCESS = """
import sys
import austeer, rmodels, MFU_screening, set_MFU
for module in (austeer, rmodels, MFU_screening, set_MFU):
    assert module.__file__.startswith(sys.prefix), module.__file__
assert austeer.__version__ == {version!r}
from MFU_screening import MFU_screening
from set_MFU import set_MFU, steer
from austeer.commands import main
model = {model!r}
main(["rank", "--model", model, "--pairs", "pairs.jsonl", "--out", "one.safetensors", "--device", "cpu"])
main(["plan", "--ranks", "one.safetensors", "--k", "4", "--alpha", "2", "--out", "one-plan.safetensors"])
main(["steer", "--model", model, "--plan", "one-plan.safetensors", "--prompt", "gave", "--max-new-tokens", "4"])
main(["export", "--model", model, "--plan", "one-plan.safetensors", "--fold", "one-folded"])
main(["export", "--model", model, "--plan", "one-plan.safetensors", "--lora", "one-lora"])
main(["methods"])
"""


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel, workplace, checkpoints, tmp_path):
    """Beside the libraries of this environment, so that only the wheel is new; all in one process, for time."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # a folder named in a .pth file comes last, and .pth files in it (of an editable checkout, say) are not read
    (packages / "libraries.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    script = IN_ONE_PROCESS.format(version=version_in_pyproject(), model=str(checkpoints["llama"]))
    printed = run(python, "-c", script, cwd=workplace)
    assert "3 x 48 AUs at site ffn" in printed and "4 atomic units" in printed and "| steered" in printed
    assert "parity with live steering" in printed and "restore-lcc" not in printed and "\ncaa " in printed
    assert (workplace / "one-folded" / "model.safetensors").exists()
    assert (workplace / "one-lora" / "adapter_config.json").exists()
    assert run(python.with_name("austeer"), "--version", cwd=workplace) == f"austeer {version_in_pyproject()}\n"


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(wheel, workplace, checkpoints, tmp_path):
    """As a user installs it. The checkout's pins as constraints: pip has those in its cache. No extra is there."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--constraint", ROOT / "requirements.txt", wheel)

    def command(*arguments):
        return run(python.with_name("austeer"), *arguments, cwd=workplace)

    model = checkpoints["llama"]
    command("rank", "--model", model, "--pairs", "pairs.jsonl", "--out", "ranks.safetensors", "--device", "cpu")
    command("plan", "--ranks", "ranks.safetensors", "--k", "4", "--alpha", "2", "--out", "plan.safetensors")
    answers = command(
        "steer", "--model", model, "--plan", "plan.safetensors", "--prompt", "gave", "--max-new-tokens", "4"
    )
    assert "unsteered" in answers and "| steered" in answers
    command("export", "--model", model, "--plan", "plan.safetensors", "--fold", "folded")
    command("export", "--model", model, "--plan", "plan.safetensors", "--ia3", "ia3")
    command("export", "--unfold", "folded", "--out", "back")
    assert (workplace / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    run(python, "-c", "from MFU_screening import MFU_screening; from set_MFU import set_MFU, steer", cwd=workplace)
    for extra, arguments in {
        "export": ("export", "--model", model, "--plan", "plan.safetensors", "--gguf", "plan.gguf"),
        "quantization": ("steer", "--model", model, "--plan", "plan.safetensors", "--quantization", "4bit"),
        "serve": ("serve", model, "plan.safetensors"),
    }.items():
        failed = attempt(python.with_name("austeer"), *arguments, cwd=workplace)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert f'pip install "austeer[{extra}]"' in failed.stderr.splitlines()[-1]


# public names

# a process per name, forked from one that has imported what takes the time and nothing of this project
EACH_FIRST = """
import os, sys
import accelerate, scipy.stats, torch, transformers.masking_utils, transformers.modeling_utils
import transformers.integrations.bitsandbytes, transformers.models.auto.modeling_auto
for name in {names!r}:
    child = os.fork()
    if not child:
        import austeer
        assert "rmodels" not in sys.modules, "importing austeer alone imports little"
        getattr(austeer, name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_each_public_name_can_be_the_first_import():
    """An import circle shows only to whoever comes in at the wrong place."""
    run(sys.executable, "-c", EACH_FIRST.format(names=austeer.__all__), cwd=ROOT)


def test_public_names_are_listed_once_typed_and_lazy():
    tree = ast.parse((ROOT / "austeer" / "__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == austeer._HOME_OF and {*homes, "__version__"} == set(austeer.__all__)
    assert set(austeer.__all__) <= set(dir(austeer))
    assert austeer.steer is not austeer.apply and austeer.load is rmodels.load
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        _ = austeer.stear
    imported = run(sys.executable, "-c", "import sys, austeer; print('torch' in sys.modules)", cwd=ROOT)
    assert imported == "False\n"


# extras

MISSING = {  # package: (extra, what needs it)
    "gguf": ("export", lambda checkpoints: save_gguf_lora(checkpoints["llama"], [], "plan.gguf")),
    "bitsandbytes": ("quantization", lambda checkpoints: rmodels.load(checkpoints["llama"], quantization="8bit")),
    "sae_lens": ("sae", lambda checkpoints: from_sae_lens("release/id")),
    "lm_eval": ("evaluation", lambda checkpoints: zero_shot(None, None, ["rte"], None)),
    "vllm": ("serve", lambda checkpoints: serve([str(checkpoints["llama"]), "plan.safetensors"])),
}


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_extra_is_one_line_that_names_it(package, checkpoints, monkeypatch):
    extra, needing = MISSING[package]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(AUSteerError) as raised:
        needing(checkpoints)
    line = str(raised.value)
    name = package.replace("_", "-")
    assert line.startswith(f'this needs {name}: pip install "austeer[{extra}]" (in the checkout: ')
    assert "\n" not in line
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n\n")[0]
    (listed,) = [line for line in extras.splitlines() if line.startswith(f"{extra} = ")]
    assert f'"{name}>=' in listed
