"""What must rename a record by its code, and what must not: each test rewrites a made-up package."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
import time

import pytest

from austeer.code_identity import code_hash, reachable

COUNT = itertools.count(1)
FILES = {
    "__init__.py": """
from .run import run
""",
    "run.py": '''
"""Run cells."""

from PACKAGE.registry import METHODS
from PACKAGE.scoring import score


def run(name, task):
    """Return the score of a method."""
    plan = METHODS[name].plan(task.pairs)
    return score(plan, task)
''',
    "base.py": '''
from abc import ABC, abstractmethod


class Method(ABC):
    """Say what a method is."""

    name: str
    trains = False

    def __init__(self, seed=0):
        self.seed = seed

    @abstractmethod
    def plan(self, pairs): ...

    def describe(self):
        return f"{self.name:>{len(self.name)}}"
''',
    "first.py": '''
import math as m

from PACKAGE import numbers
from PACKAGE.base import Method

ALPHA = 2.0


class First(Method):
    """Scale by the mean."""

    name = "first"

    def plan(self, pairs, power=2):
        def scale(x):
            """Return it scaled."""
            return x * ALPHA

        return scale(numbers.mean(pairs)) ** power + m.sqrt(2)
''',
    "second.py": """
from PACKAGE.base import Method


class Second(Method):
    name = "second"

    def plan(self, pairs):
        from PACKAGE.numbers import total as add

        return add(pairs)
""",
    "numbers.py": """
def mean(values):
    return total(values) / len(values)


def total(values):
    return sum(values)


def median(values):
    return sorted(values)[len(values) // 2]
""",
    "scoring.py": """
LIMIT, UNIT = 10, "points"


def score(plan, task):
    return min(plan, LIMIT)
""",
    "registry.py": """
from PACKAGE.first import First
from PACKAGE.second import Second

METHODS = {method.name: method for method in (First(), Second())}
""",
}


class Package:
    def __init__(self, folder):
        self.folder, self.name = folder, folder.name
        for file, text in FILES.items():
            self.write(file, text)

    def write(self, file: str, text: str) -> None:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("PACKAGE", self.name))
        moment = time.time_ns() + next(COUNT) * 10**9  # two writes within a tick of the clock are two versions
        os.utime(path, ns=(moment, moment))

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        old = old.replace("PACKAGE", self.name)
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
        self.write(file, text.replace(old, new))

    def roots(self, *names: str) -> list[str]:
        return [f"{self.name}.{name}" for name in names]

    def hash(self, *names: str, cut: tuple[str, ...] = ("registry:METHODS",)) -> str:
        return code_hash(*self.roots(*names), cut=self.roots(*cut))

    def keys(self, *names: str, cut: tuple[str, ...] = ()) -> set[str]:
        return {key.removeprefix(f"{self.name}.") for key in reachable(*self.roots(*names), cut=self.roots(*cut))}

    def hashes(self) -> tuple[str, str]:
        return self.hash("run:run", "first:First"), self.hash("run:run", "second:Second")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Package:
    monkeypatch.syspath_prepend(tmp_path)
    return Package(tmp_path / f"made_up_{next(COUNT)}")


def test_reaches_exactly_what_a_cell_uses(package):
    common = {"run:run", "scoring:score", "scoring:LIMIT", "base:Method", "base:Method.__init__", "base:Method.plan"}
    first = {"first:First", "first:First.plan", "first:ALPHA", "numbers:mean", "numbers:total"}
    assert package.keys("run:run", "first:First", cut=("registry:METHODS",)) == common | first
    second = {"second:Second", "second:Second.plan", "numbers:total"}
    assert package.keys("run:run", "second:Second", cut=("registry:METHODS",)) == common | second


SAME = {
    "comment": ("first.py", "ALPHA = 2.0", "# the authors' own\nALPHA = 2.0  # why"),
    "module docstring": ("run.py", '"""Run cells."""', '"""Run many cells."""'),
    "new module docstring": ("scoring.py", "LIMIT, UNIT", '"""Score."""\nLIMIT, UNIT'),
    "function docstring": ("run.py", '"""Return the score of a method."""', '"""Say it otherwise."""'),
    "new function docstring": ("numbers.py", "    return sum(values)", '    """Add."""\n    return sum(values)'),
    "class docstring": ("first.py", '"""Scale by the mean."""', ""),
    "nested docstring": ("first.py", '"""Return it scaled."""', ""),
    "docstring as a whole body": (
        "base.py",
        "def plan(self, pairs): ...",
        'def plan(self, pairs):\n        """Plan."""',
    ),
    "line breaks": ("run.py", "score(plan, task)", "score(\n        plan,\n        task,\n    )"),
    "quotes": ("second.py", '"second"', "('sec'\n    'ond')"),
    "unused definition": ("numbers.py", "def median", "def mode(values): ...\n\n\ndef median"),
    "changed unused definition": ("numbers.py", "// 2", "// 3"),
    "unused method": ("base.py", "return f", "return 'method ' + f"),
    "unused import": ("first.py", "import math as m", "import math as m\nimport os"),
    "registry": ("registry.py", "(First(), Second())", "(First(),)"),
    "import with an alias": ("run.py", "scoring import score", "scoring import score as score"),
    "relative import": ("run.py", "from PACKAGE.scoring import", "from .scoring import"),
}


@pytest.mark.parametrize("edit", SAME.values(), ids=SAME)
def test_changes_nothing(package, edit):
    before = package.hashes()
    package.edit(*edit)
    assert package.hashes() == before


ONLY_FIRST = {
    "line": ("first.py", "** power", "* power"),
    "default": ("first.py", "power=2", "power=3"),
    "constant": ("first.py", "ALPHA = 2.0", "ALPHA = 2"),
    "type of a constant": ("first.py", '"first"', 'b"first"'),
    "nested function": ("first.py", "x * ALPHA", "ALPHA * x"),
    "helper": ("numbers.py", "total(values) / len(values)", "total(values) / 2"),
    "class attribute": ("first.py", '    name = "first"\n', '    name = "first"\n    trains = True\n'),
    "decorator": ("first.py", "    def plan(", "    @staticmethod\n    def plan("),
    "same name from elsewhere outside": ("first.py", "import math as m", "import cmath as m"),
}


@pytest.mark.parametrize("edit", ONLY_FIRST.values(), ids=ONLY_FIRST)
def test_changes_the_method_that_uses_it_and_no_other(package, edit):
    first, second = package.hashes()
    package.edit(*edit)
    changed_first, unchanged_second = package.hashes()
    assert (changed_first != first, unchanged_second == second) == (True, True)


BOTH = {
    "root": ("run.py", "score(plan, task)", "-score(plan, task)"),
    "helper of both": ("numbers.py", "sum(values)", "sum(values, 0.0)"),
    "constant": ("scoring.py", "10", "11"),
    "base": ("base.py", "trains = False", "trains = True"),
    "special method of the base": ("base.py", "seed=0", "seed=1"),
    "new reference to a method": ("run.py", "task.pairs", "task.describe().pairs"),
}


@pytest.mark.parametrize("edit", BOTH.values(), ids=BOTH)
def test_changes_both_methods(package, edit):
    before = package.hashes()
    package.edit(*edit)
    assert all(new != old for new, old in zip(package.hashes(), before, strict=True))


def test_a_new_file_changes_nothing(package):
    before = package.hashes()
    package.write("third.py", FILES["second.py"].replace("Second", "Third"))
    package.edit("registry.py", "Second\n", "Second\nfrom .third import Third\n")
    package.edit("registry.py", "Second())", "Second(), Third())")
    assert package.hashes() == before


@pytest.mark.parametrize(
    "imports, call",
    [
        ("from PACKAGE.averages import mean", "mean"),
        ("from PACKAGE.averages import mean as average", "average"),
        ("from .averages import mean", "mean"),
        ("from . import averages", "averages.mean"),
        ("import PACKAGE.averages", "PACKAGE.averages.mean"),
        ("import PACKAGE.averages as a", "a.mean"),
        ("from PACKAGE.offered import average", "average"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .averages import mean", "mean"),
    ],
)
def test_a_moved_helper_changes_nothing(package, imports, call):
    before = package.hashes()
    helper = "def mean(values):\n    return total(values) / len(values)\n"
    package.edit("numbers.py", helper, "")
    package.write("averages.py", f"from .numbers import total\n\n\n{helper}")
    package.write("offered.py", "from .averages import mean as average")
    package.edit("first.py", "from PACKAGE import numbers", imports)
    package.edit("first.py", "numbers.mean(", f"{call.replace('PACKAGE', package.name)}(")
    assert package.hashes() == before
    package.edit("averages.py", "/ len(values)", "/ 2")
    assert (package.hashes()[0] != before[0], package.hashes()[1] == before[1]) == (True, True)


def test_a_file_that_becomes_a_folder_changes_nothing(package):
    before = package.hashes()
    os.remove(package.folder / "numbers.py")
    package.write("numbers/__init__.py", "from .all import mean, total")
    package.write("numbers/all.py", FILES["numbers.py"])
    assert package.hashes() == before
    os.remove(package.folder / "numbers" / "__init__.py")  # a namespace package
    package.edit("first.py", "from PACKAGE import numbers", "import PACKAGE.numbers.all as numbers")
    package.edit("second.py", "PACKAGE.numbers import", "PACKAGE.numbers.all import")
    assert package.hashes() == before


def test_the_place_of_an_import_changes_nothing(package):
    before = package.hashes()
    package.edit("second.py", "        from PACKAGE.numbers import total as add\n", "")
    package.edit("second.py", "add(pairs)", "numbers.total(pairs)")
    package.edit("second.py", "\n\nclass", "import PACKAGE.numbers as numbers\n\n\nclass")
    package.edit("first.py", "import math as m", "from math import sqrt as root")
    package.edit("first.py", "m.sqrt(2)", "root(2)")
    assert package.hashes() == before


def test_roots_are_objects_or_names_wherever_they_are_offered(package):
    run = importlib.import_module(package.name).run
    first = importlib.import_module(f"{package.name}.first").First
    cut = package.roots("registry:METHODS")
    assert code_hash(first, run, cut=cut) == package.hashes()[0]
    assert code_hash(f"{package.name}:run", first, cut=cut) == package.hashes()[0]
    package.edit("run.py", "score(plan, task)", "-score(plan, task)")
    assert code_hash(first, run, cut=cut) == package.hashes()[0], "the file counts, not what is loaded"


@pytest.mark.parametrize("name, has_spec", [("my_task", True), ("my.task", True), ("__main__", False)])
def test_a_root_loaded_by_its_path_is_read_from_there(package, monkeypatch, name, has_spec):
    package.write("task.py", "def items():\n    return helper()\n\n\ndef helper(): ...\n")
    spec = importlib.util.spec_from_file_location(name, package.folder / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__spec__ = spec if has_spec else None  # a script has none
    monkeypatch.setitem(sys.modules, name, module)
    assert reachable(module.items).keys() == {f"{name}:items", f"{name}:helper"}


def test_without_a_cut_a_registry_counts_with_all_that_it_lists(package):
    assert {"registry:METHODS", "first:First", "second:Second"} <= package.keys("run:run")


def test_a_cut_goes_with_the_statements_that_fill_the_registry(package):
    package.edit("registry.py", "METHODS =", "def find(name):\n    return check(METHODS[name])\n\n\nMETHODS =")
    package.edit("registry.py", "\n\nMETHODS", "\n\ndef check(method): ...\n\n\nMETHODS")
    package.write("registry.py", (package.folder / "registry.py").read_text() + "METHODS['last'] = check(First())\n")
    package.edit("run.py", "registry import METHODS", "registry import find")
    package.edit("run.py", "METHODS[name]", "find(name)")
    assert {"registry:<statement 1>", "first:First"} <= package.keys("run:run")
    keys = package.keys("run:run", cut=("registry:METHODS",))
    assert {key for key in keys if key.startswith(("registry", "first"))} == {"registry:find", "registry:check"}


@pytest.mark.parametrize(
    "statement", ["register(f)", "for g in (f,):\n    register(g)", "f.version = 2", "TABLE[1] = f"]
)
def test_a_statement_on_what_is_reached_counts(package, statement):
    package.write("hooks.py", f"from .base import register\nTABLE = {{}}\ndef f(): ...\ndef g(): ...\n{statement}\n")
    package.edit("base.py", "\n\nclass", "def register(f):\n    return f\n\n\nclass")
    assert "hooks:<statement 1>" in package.keys("hooks:f")
    assert ("base:register" in package.keys("hooks:f")) == ("register" in statement)
    assert "hooks:<statement 1>" not in package.keys("base:Method")


METHODS = """
class A:
    def plain(self): ...

    def __len__(self): ...

    @property
    def size(self): ...

    @size.setter
    def size(self, value): ...

    def _body(self): ...

    other = _body
"""


@pytest.mark.parametrize(
    "use, methods",
    [
        ("", set()),
        ("a.plain()", {"plain"}),
        ("getattr(a, 'plain')", {"plain"}),
        ("A.plain(a)", {"plain"}),
        ("a.size = 2", {"size"}),
        ("lambda: [b.size for b in a]", {"size"}),
    ],
)
def test_a_method_counts_when_its_name_is_used(package, use, methods):
    package.write("a.py", METHODS)
    package.write("use.py", f"from PACKAGE.a import A\ndef f(a: A):\n    return 0\n    {use}\n")
    used = {"use:f", "a:A", "a:A.__len__", "a:A._body"}
    assert package.keys("use:f") == used | {f"a:A.{name}" for name in methods}


def test_a_subclass_of_a_framework_counts_as_a_whole_with_its_mixins(package):
    package.write("mixin.py", "class Mixin:\n    def forward(self): ...\n\n\nclass Plain(Mixin): ...\n")
    package.write(
        "model.py", "import ast\nfrom .mixin import Mixin\nclass Own(ast.NodeVisitor):\n    def visit_Name(self): ..."
    )
    package.edit("model.py", "class Own", "class Model(Mixin, Own):\n    def a(self): ...\nclass Own")
    whole = {"model:Model", "model:Model.a", "model:Own", "model:Own.visit_Name", "mixin:Mixin", "mixin:Mixin.forward"}
    assert package.keys("model:Model") == whole
    assert package.keys("mixin:Plain") == {"mixin:Plain", "mixin:Mixin"}


@pytest.mark.parametrize("base", ["object", "ValueError", "Generic[T]", "typing.Protocol", "dict[str, int]"])
def test_a_plain_base_calls_no_methods(package, base):
    package.write("a.py", f"import typing\nfrom typing import Generic, TypeVar\nclass A({base}):\n    def b(self): ...")
    assert package.keys("a:A") == {"a:A"}


@pytest.mark.parametrize("head", ["@dataclass\nclass A:", "class A(NamedTuple):"])
def test_fields_and_their_defaults_count(package, head):
    imports = "from dataclasses import dataclass\nfrom typing import NamedTuple\nSIZE = 3\n"
    package.write("a.py", f"{imports}{head}\n    size: int = SIZE\n")
    before = package.hash("a:A")
    assert package.keys("a:A") == {"a:A", "a:SIZE"}
    package.edit("a.py", "size: int", "size: float")
    assert package.hash("a:A") != before


def test_all_alternatives_of_an_import_count(package):
    package.write("fast.py", "def f(): ...\n")
    package.write("slow.py", "def f(): ...\ndef g(): ...\n")
    package.write("a.py", "try:\n    from .fast import f\nexcept ImportError:\n    from .slow import f\ndef h(): f()\n")
    assert package.keys("a:h") == {"a:h", "fast:f", "slow:f"}
    package.write("a.py", "try:\n    from .fast import f\nexcept ImportError:\n    f = None\ndef h(): f()\n")
    assert package.keys("a:h") == {"a:h", "a:f", "fast:f"}


@pytest.mark.parametrize(
    "body, uses",
    [
        ("def f(g): return g", False),
        ("def f():\n    g = 1\n    return g", False),
        ("def f(): return [g for g in 'ab']", False),
        ("def f(): return lambda g: g", False),
        ("def f(): return [g for g in g]", True),
        ("def f(): return (lambda g: g)(g)", True),
        ("def f(g=g): return g", True),
        ("def f(x: g): return x", True),
        ("def f():\n    global g\n    g = g + 1", True),
        ("def f():\n    def h(x):\n        return g(x)\n    return h", True),
    ],
)
def test_a_variable_is_no_reference(package, body, uses):
    package.write("a.py", f"g = 1\n{body}\n")
    assert ("a:g" in package.keys("a:f")) is uses


def test_statements_on_one_name_count_together(package):
    package.write("a.py", "A, B = 1, 2\nA += 1\nif B:\n    C = A\nelse:\n    C = 3\n")
    assert package.keys("a:C") >= {"a:C", "a:A", "a:B"}
    for old, new in (("1, 2", "1, 4"), ("+=", "-="), ("if B", "if not B"), ("C = 3", "C = 5")):
        before = package.hash("a:C")
        package.edit("a.py", old, new)
        assert package.hash("a:C") != before


def test_a_module_as_a_value_counts_as_all_of_it(package):
    package.write("studies.py", "from PACKAGE import numbers\nSTUDIES = {'numbers': numbers}\n")
    assert package.keys("studies:STUDIES") == {"studies:STUDIES", "numbers:mean", "numbers:total", "numbers:median"}


def test_definitions_of_one_name_are_told_apart(package):
    for module, value in (("a", 1), ("b", 2)):
        package.write(f"{module}.py", f"def f(): return {value}\nclass C:\n    def __len__(self): return {value}\n")
    package.write("use.py", "from PACKAGE import a, b\ndef g(): return a.f() / b.f()\nclass D(a.C): ...\nE = b.C\n")
    quotient, classes = package.hash("use:g"), package.hash("use:D", "use:E")
    package.edit("use.py", "a.f() / b.f()", "b.f() / a.f()")
    package.edit("use.py", "D(a.C)", "D(b.C)")
    package.edit("use.py", "E = b.C", "E = a.C")
    assert package.hash("use:g") != quotient
    assert package.hash("use:D", "use:E") != classes


def test_an_import_in_a_class_is_followed(package):
    package.write("a.py", "class A:\n    from .numbers import median as middle\n    size = middle([1])\n")
    assert package.keys("a:A") == {"a:A", "numbers:median"}


def test_imports_in_a_circle_end(package):
    package.write("a.py", "from .b import f, g\n")
    package.write("b.py", "from .a import f, h\ndef g(): return f() + h()\n")
    assert package.keys("a:g") == {"b:g"}


@pytest.mark.parametrize("name", ["PACKAGE.run:ran", "PACKAGE.run", "PACKAGE.nowhere:run", "no_such_module:f"])
def test_a_root_or_a_cut_without_source_is_an_error(package, name):
    name = name.replace("PACKAGE", package.name)
    for roots, cut in (([name], ()), (package.roots("run:run"), (name,))):
        with pytest.raises(ValueError, match=f"^no source of {name}: "):
            code_hash(*roots, cut=cut)


def test_a_root_is_a_class_or_a_function_of_python():
    with pytest.raises(ValueError, match="no source of builtins:len: "):
        code_hash(len)
    with pytest.raises(ValueError, match="3 is neither a class nor a function; give its class"):
        code_hash(3)


PINNED = """
import os.path as p
from dataclasses import dataclass, field

LIMIT = {"a": 1_000, "b": 1.5e-7, **{}}


@dataclass(frozen=True)
class Cell[PARAMETER]:
    size: int | None = None
    rest: list[str] = field(default_factory=list)

    async def __call__(self, *args, key=b"x", **options):
        try:
            return f"{self.size!r:>{LIMIT['a']}} {p.join(*args)}" "\u00b5"
        except (ValueError, OSError) as error:
            raise RuntimeError from error
        finally:
            with open(key) as file, file:
                print(*(line[1:-1:2] for line in file if (n := len(line)) > 3), sep="", end=...)


def run(cell: Cell, /, *, power=-2j):
    '''Run.'''
    match cell:
        case Cell(size=0 | 1) | [_, *_]:
            return None
    return lambda x, *y: not x if x <= 3 < y else x @ power
"""


def test_the_hash_is_the_same_in_every_python(package):
    package.write("a.py", PINNED.replace("[PARAMETER]", ""))
    assert package.hash("a:run") == "49c40b8ee28442ce"
    if sys.version_info >= (3, 12):
        package.write("a.py", PINNED.replace("PARAMETER", "T"))
        assert package.hash("a:run") == "49c40b8ee28442ce"


def test_a_walk_is_quick(package):
    functions = "".join(
        f"def f{n}(x):\n    y = [a.b(c) for c in x if c > {n}]\n    return f{n + 1}(y)\n" for n in range(33)
    )
    for n in range(150):
        package.write(f"m{n}.py", f"from PACKAGE.m{n + 1} import f0 as f33\nimport numpy as a\n{functions}")
    seconds = []
    for _ in range(2):
        start = time.process_time()
        package.hash("m0:f0", cut=())
        seconds.append(time.process_time() - start)
    assert len(package.keys("m0:f0")) == 150 * 33
    assert seconds[0] < 3 and seconds[1] < 0.1, seconds  # 0.7 and 0.005 on a quiet machine
