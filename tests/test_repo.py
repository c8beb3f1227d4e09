"""The repository as a whole: imports flow one way, documents tell the truth, nothing unsafe."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
OWN = ("austeer", "rmodels", "MFU_screening", "set_MFU", "embedded", "eval", "experiments", "paper", "main")
# What a part may reach, by whatever way: data flows one way. The longest prefix of a module's name decides.
MAY_REACH = {
    "austeer.errors": (),
    "austeer.files": ("austeer.errors",),
    "rmodels": ("austeer.errors", "austeer.files"),
    "austeer": ("rmodels",),
    "MFU_screening": ("austeer", "rmodels"),
    "set_MFU": ("austeer", "rmodels"),
    "austeer.commands": ("austeer", "austeer.methods", "austeer.export", "rmodels", "MFU_screening", "set_MFU"),
    "austeer.__main__": ("austeer", "austeer.commands"),
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
    # what runs only as a script, or is read by type checkers only, is no arrow between modules
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and re.search("__name__|TYPE_CHECKING", ast.unparse(node.test)))]  # fmt: skip
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
        back = {one for one in reached if part_of(one) not in allowed | {"austeer.errors", "austeer.files"}}
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


DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document):
    text = (ROOT / document).read_text()
    folders = "rmodels|tests|docs|benchmarks|eval|embedded|experiments|paper|scripts"
    named = re.findall(rf"`((?:{folders})/[\w./-]+|austeer/[\w./-]+(?:\.py|/))`|\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    named += re.findall(r"`(\w+\.(?:py|sh|txt|cff))`()", text)
    assert named or document != "README.md"
    beside = {"": "rmodels", "docs/benchmarks.md": "benchmarks"}  # where names without a folder are
    places = [ROOT, (ROOT / document).parent, ROOT / beside[""], ROOT / beside.get(document, "")]
    for path in [a or b for a, b in named]:
        assert any((place / path).exists() for place in places), path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_sections_lead_somewhere(document):
    for path, section in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", (ROOT / document).read_text()):
        text = ((ROOT / document).parent / path if path else ROOT / document).read_text()
        headings = [re.sub(r"[^\w -]", "", heading).lower() for heading in re.findall(r"^#+ (.+)$", text, re.M)]
        assert section in [heading.replace(" ", "-") for heading in headings], f"{path}#{section}"


def test_the_readme_is_short_and_has_both_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300
    assert {"bash reproduce.sh", "bash tests/run.sh"} <= {line.partition("#")[0].strip() for line in text.splitlines()}


@pytest.mark.parametrize("document", ["README.md", "docs/using.md"])
def test_code_in_documents_is_python(document):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S):
        ast.parse(block)


def test_the_first_example_prints_what_it_says(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    promised = re.findall(r"print\(.*\)  # (.+)", code)
    printed = capsys.readouterr().out.splitlines()
    assert len(promised) == 2 and [line.partition("Reply : ")[2] for line in printed] == promised


def commands(text):
    """Yield every command of the project in indented blocks and in code spans: the program and its words."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    shown = [line.partition(" #")[0] for line in lines if line.startswith("    ")]
    for line in [*shown, *re.findall(r"`([^`]+)`", text.replace("\n", " "))]:
        found = re.search(r"\b(main\.py|MFU_screening\.py|set_MFU\.py|reproduce\.sh|austeer)(?= |$)(.*)", line)
        if found and re.match(r"\s*(?:srun bash -c .*|\S*python|bash|accelerate launch|austeer|main\.py) ?", line):
            yield found[1], found[2].split()


def options_of(module, seen=()):
    """Return the options that a module, and the `arguments` it imports, add to a parser and do not hide."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    options = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any("SUPPRESS" in ast.unparse(word.value) for word in node.keywords):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            options |= {name for name in names if re.fullmatch(r"--[\w-]+", name)}
        if isinstance(node, ast.ImportFrom):
            shared = [f"{node.module}.{alias.name}" for alias in node.names if alias.name == "arguments"]
            for name in [*shared, *([node.module] if node.module.endswith(".arguments") else [])]:
                options |= options_of(name, (*seen, module)) if name not in seen else set()
    return options


def commands_in(path):
    """Return the names and modules of the dict COMMANDS of a file, without importing it."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            return {name: module for name, (module, _) in ast.literal_eval(node.value).items()}
    raise AssertionError(f"{path} has no COMMANDS")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_exist(document):
    alone = {
        "MFU_screening.py": "austeer.commands.rank",
        "set_MFU.py": "austeer.commands.plan",
        "reproduce.sh": "paper.reproduce",
        "main.py": "experiments.compare",
    }
    several = {"main.py": "main.py", "austeer": "austeer/commands/__init__.py"}
    for program, words in commands((ROOT / document).read_text()):
        name = words[0] if program in several and words and re.fullmatch(r"[a-z][\w-]*", words[0]) else None
        if name:
            there = commands_in(several[program])
            assert name in there, f"{program} has no command {name}"
        if name or program in alone:
            given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            unknown = given - options_of(there[name] if name else alone[program]) - {"--help"}
            assert not unknown, f"{program} {' '.join(words)}: there is no {', '.join(unknown)}"


def test_the_readme_shows_the_numbers_of_the_report():
    """Its section on what was measured quotes the findings on top of the committed report."""
    readme, report = (ROOT / "README.md").read_text(), (ROOT / "docs" / "embedded" / "report.md").read_text()
    quoted = readme.split("On the **embedded models**")[1].split("\n## ")[0]
    found = report.split("## Findings")[1].split("\n## ")[0]
    gain = r"([+-][\d.]+)\s+\[([+-][\d.]+), ([+-][\d.]+)\]"
    gains = re.search(r"t interval: (.+?)\. \(", found).group(1).split("; ")
    by_rule = {re.match(r"(.+?) Head ", part).group(1): part for part in gains}
    for name, text in by_rule.items():
        called = {"causal momentum with a KL budget": "with a KL budget"}.get(name, name)
        of_report = re.findall(gain, text)
        of_readme = re.findall(gain, re.split(rf"{called}(?: gains)? (?=\+)", quoted.replace("\n ", ""))[1])[:2]
        assert len(of_report) == 2 and of_readme == of_report, name
    assert len(by_rule) == 4
    pattern = r"of its controls: causal momentum in (\d+) of (\d+), the published rule in (\d+) of (\d+)"
    (ours, of, theirs, _), flat = re.search(pattern, found).groups(), " ".join(quoted.split())
    assert f"in {ours} of {of} places (a task at a site), the published rule in {theirs} of {of}" in flat
    assert "boolq (100.0 %)" in found and "On boolq all are bias: the unsteered model is right in 100 %" in flat
    assert "over 5 training seeds" in found and "five training seeds" in flat


def test_the_guide_to_tables(tmp_path, monkeypatch):
    """Its example is a spec that is read as it says, and it names every field and every kind."""
    from experiments.cell import FIELD_NAMES
    from paper import specs

    guide = (ROOT / "docs" / "tables.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", guide, re.S)
    for shared in ("rows.json", "models.json"):
        shutil.copy(specs.FOLDER / shared, tmp_path)
    (tmp_path / "four-aus.json").write_text(example)
    kinds = {json.loads(path.read_text()).get("kind") for path in specs.FOLDER.glob("*.json")} - {None}
    monkeypatch.setattr(specs, "FOLDER", tmp_path)
    assert specs.names() == ["four-aus"] and specs.read("paper") == []
    (spec,) = specs.read("embedded")
    cells = {cell for entry in spec.entries for cell in entry.cells}
    (rows, columns, said) = re.search(r"It has (\d+) rows .*, (\d+) columns and (\d+) cells", guide).groups()
    assert (len(spec.rows), len(spec.columns), len(cells)) == (int(rows), int(columns), int(said))
    assert {cell.search.ks for cell in cells if cell.steered} == {(4,)}, "shared rows choose from the same values"
    assert {cell.task.limit for cell in cells} == {200}
    (limited,) = specs.read("embedded", limit=20)
    assert {cell.task.limit for entry in limited.entries for cell in entry.cells} == {20}
    of_a_file = {"title", "kind", "says", "blocks", "base", "averages", "panels"} | specs.SPEC_FIELDS
    for word in FIELD_NAMES | specs.TABLE_FIELDS | of_a_file | kinds:
        assert f"`{word}`" in guide, word


def test_the_readme_traces_a_number_that_there_is():
    from paper import specs

    text = (ROOT / "README.md").read_text()
    (table, row, column) = re.search(r"main\.py trace (\S+) (\S+) (\S+)", text).groups()
    (spec,) = specs.read("embedded", [table])
    assert any((entry.row, entry.column) == (row, column) for entry in spec.entries)


def test_the_citation_file_cites_this_software_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["type"] == "software" and cited["license"] == "Apache-2.0" and cited["authors"]
    assert f"## {cited['version']}" in (ROOT / "CHANGELOG.md").read_text()
    (paper,) = cited["references"]
    assert paper["type"] == "conference-paper" and len(paper["authors"]) == 10


def test_fidelity_names_every_switch():
    from dataclasses import fields

    from austeer.tokens import Protocol

    text = (ROOT / "docs" / "fidelity.md").read_text()
    assert all(f"`{field.name}`" in text for field in fields(Protocol) if field.name != "name")
    assert {int(n) for n in re.findall(r"\(D(\d+)\)", text)} == set(range(1, 27))
    assert {re.match(r"\((\w)\)", label)[0] for label in re.findall(r"\(\w\)(?= \|)", text)} <= {
        label for line in text.splitlines() if line.startswith("    ") for label in re.findall(r"\(\w\)", line)
    }, "every effect has its command"


def test_fidelity_counts_the_aus_turned_over_as_the_command_does(capsys):
    from austeer.commands.plan import main

    text = (ROOT / "docs" / "fidelity.md").read_text()
    n, k, alpha = re.search(r"(\d+) of \d+ AUs at k (\d+), alpha (\d+) \(b\)", text).groups()
    (options,) = re.findall(r"    python set_MFU\.py (.*?) +# \(b\)", text)
    assert f"--k {k} --alpha {alpha}" in options
    main([str(ROOT / word) if word.startswith("AU_ranks/") else word for word in options.split()])
    assert capsys.readouterr().out.startswith(f"{k} atomic units, {n} of them with the sign turned over")


def test_scripts_parse():
    for script in (
        "scripts/setup.sh",
        "scripts/setup-vllm.sh",
        "scripts/serve.sh",
        "benchmarks/run.sh",
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


def test_the_shipped_prose_is_clean_paragraphs_and_its_origin_is_beside_it():
    text = (ROOT / "austeer" / "prose.txt").read_text()
    paragraphs = text.splitlines()
    words = [word for paragraph in paragraphs for word in paragraph.split()]
    assert len(words) >= 20_000 and text.isascii() and text.endswith("\n")
    assert all(paragraph == " ".join(paragraph.split()) and len(paragraph) > 40 for paragraph in paragraphs)
    assert len(set(paragraphs)) == len(paragraphs)
    leftover = r"(?i)gutenberg|\bchapter \d|[*_<>{}\[\]|]|https?:|e-?text|licen[cs]e"
    assert not [found for paragraph in paragraphs if (found := re.search(leftover, paragraph))]
    origin = " ".join((ROOT / "austeer" / "prose.md").read_text().split())
    assert f"{len(paragraphs)} paragraphs" in origin and f"{len(words):,} words" in origin
    # the works take turns, so any tenth of the file has all three
    tenth = len(paragraphs) // 10
    for start in range(0, len(paragraphs) - tenth, tenth):
        part = " ".join(paragraphs[start : start + tenth])
        assert re.search("Federal|Nation|Government", part) and re.search("Anne|Wentworth", part), start
        assert re.search("whale|sea|ship", part), start
