"""Hash the code behind a result: the definitions that given classes and functions reach by name, and no others.

    code_hash(run_cell, type(method), type(task), type(model), cut={"austeer.methods.registry:METHODS"})

A comment, a docstring, the form of an import, the file that holds a definition, and code that is not reached change
nothing; a line of a reached definition changes the hash. Sources are read, never imported. Names that are put together
at run time are not seen, nor `from x import *` and annotations in quotes: give such classes as roots, and let a module
with a lazy `__getattr__` repeat its imports under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from symtable import SymbolTable, symtable
from typing import Any, NamedTuple

# top-level names whose code counts; those of the roots' own modules are added
OWN = frozenset({"austeer", "rmodels", "eval", "experiments", "embedded", "paper", "MFU_screening", "set_MFU"})
# bases that, like builtins, call no method by a name of their own, special methods aside
PLAIN = {"ABC", "Enum", "Flag", "Generic", "IntEnum", "IntFlag", "NamedTuple", "Protocol", "StrEnum", "TypedDict"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
IGNORED = {"ctx", "kind", "type_comment", "type_params"}  # the last one is new in Python 3.12

Root = type | Callable | str
Dotted = tuple[str, ...]  # a.b.c
File = tuple[str, int, int]  # a module's path, and its state: time of change and size
Imports = dict[str, tuple[tuple[str, Dotted], ...]]  # what a name means, as (module, names inside it)


def code_hash(*roots: Root, cut: Collection[str] = frozenset()) -> str:
    """Return 16 hex digits for all code that the roots reach.

    roots: classes, functions or "module:name" strings.
    cut: "module:name" strings at which to stop, for registries: their values list what a cell does not use.
    """
    return _walk(roots, cut)[1]


def reachable(*roots: Root, cut: Collection[str] = frozenset()) -> dict[str, str]:
    """Return the digest of every definition behind `code_hash` by "module:name", to see which of them changed."""
    return dict(_walk(roots, cut)[0])


def _walk(roots: Iterable[Root], cut: Collection[str]) -> tuple[dict[str, str], str]:
    names = frozenset(map(_full_name, roots))
    return _walked(names, frozenset(cut), _files({name.partition(":")[0] for name in names}))


def _full_name(root: Root) -> str:
    if isinstance(root, str):
        return root
    module, name = getattr(root, "__module__", None), getattr(root, "__qualname__", None)
    if not module or not name:
        raise ValueError(f"{root!r} is neither a class nor a function; give its class")
    return f"{module}:{name}"


class _Target(NamedTuple):
    """Say what a name stands for."""

    key: str | None  # "module:name" of the definition, None outside the repository
    text: str = ""  # how digests spell it, whatever an import calls it
    attributes: Dotted = ()  # looked up on the definition: each may be a method


class _Code:
    """Index the repository as its files are now; once one of them changes, a new object takes over."""

    def __init__(self, files: frozenset[tuple[str, File | None]]):
        self.files = dict(files)
        self.meanings: dict[tuple[str, Dotted], list[_Target]] = {}

    def named(self, name: str) -> list[_Target]:
        module, _, path = name.partition(":")
        targets = [target for target in self.follow(module, tuple(path.split("."))) if target.key]
        if not targets:
            raise ValueError(f"no source of {name}: roots and cuts are module:name of what a Python file defines")
        return targets

    def reach(self, targets: list[_Target], cut: set[str]) -> set[str]:
        """Return the keys of all that the targets lead to."""
        keys: set[str] = set()
        words: set[str] = set()
        while targets:
            for target in targets:  # a list that grows on the way
                words.update(target.attributes)
                if target.key and target.key not in keys and target.key not in cut:
                    keys.add(target.key)
                    words |= self.definition(target.key).words
                    targets += self.targets(target.key)
            more = {*self.methods(keys, words), *self.statements(keys, cut)}
            targets = [_Target(key) for key in more - keys - cut]
        return keys

    def methods(self, keys: set[str], words: set[str]) -> Iterator[str]:
        """Yield the methods that may be called: by an attribute, a string, the language or a framework."""
        framework_classes = set().union(*map(self.framework_family, keys))
        for key in keys:
            for name in self.definition(key).methods:
                if key in framework_classes or name in words or (name.startswith("_") and name.endswith("_")):
                    yield f"{key}.{name}"

    def framework_family(self, key: str) -> set[str]:
        """Return a class and its ancestors here, mixins too, if one of the bases is a framework's."""
        family: set[str] = set()
        is_foreign, bases = False, [_Target(key)] if self.definition(key).is_class else []
        while bases:
            base = bases.pop()
            if not base.key or not self.definition(base.key).is_class:
                name = base.text.rpartition(".")[2]
                is_foreign |= name not in PLAIN and not hasattr(builtins, name)
            elif base.key not in family:
                family.add(base.key)
                bases += self.resolve(base.key, *self.definition(base.key).bases)
        return family if is_foreign else set()

    def statements(self, keys: set[str], cut: set[str]) -> Iterator[str]:
        """Yield statements like `register(f)`: they are part of what f does, though no definition names them.

        Statements that name nothing reached in their module are left out, and so are those that fill a registry.
        """
        for module in {key.partition(":")[0] for key in keys}:
            for name in self.module(module).statements:
                names = {target.key for target in self.targets(f"{module}:{name}") if target.key}
                if not names & cut and any(key.startswith(f"{module}:") for key in names & keys):
                    yield f"{module}:{name}"

    def hash(self, digests: dict[str, str]) -> str:
        """Hash the set of digests, each with those of what it names, and of what that names, three steps deep.

        The digests alone would not tell a.f from b.f where both are used, nor say which class a method belongs to.
        """
        edges = {key: [key, *(target.key for target in self.targets(key) if target.key in digests)] for key in digests}
        for key in digests:
            methods = (f"{key}.{name}" for name in sorted(self.definition(key).methods))
            edges[key] += [name for name in methods if name in digests]
        labels = digests
        for _ in range(3):
            labels = {key: _sha(" ".join(labels[name] for name in edges[key])) for key in digests}
        return _sha(" ".join(sorted(set(labels.values()))))

    def digest(self, key: str) -> str:
        return _sha(
            "".join(
                piece if isinstance(piece, str) else f"<{sorted({target.text for target in self.resolve(key, piece)})}>"
                for piece in self.definition(key).pieces
            )
        )

    def targets(self, key: str) -> list[_Target]:
        return self.resolve(key, *(piece for piece in self.definition(key).pieces if isinstance(piece, tuple)))

    def resolve(self, key: str, *paths: Dotted) -> list[_Target]:
        """Return what paths mean inside a definition, which may import names of its own."""
        module, imports = key.partition(":")[0], self.definition(key).imports
        return [
            target
            for name, *rest in paths
            for where, path in imports.get(name, ((module, (name,)),))
            for target in self.follow(where, (*path, *rest))
        ]

    def follow(self, module: str, path: Dotted) -> list[_Target]:
        """Return what a path means in a module, behind all imports."""
        if (module, path) not in self.meanings:
            self.meanings[module, path] = []  # the answer where imports go in a circle
            self.meanings[module, path] = self._follow(module, path)
        return self.meanings[module, path]

    def _follow(self, module: str, path: Dotted) -> list[_Target]:
        if module not in self.files:
            return [_Target(None, ".".join((module, *path)))]
        code = self.module(module)
        if not path:  # a module as a value: whoever has it may use all of it
            return [_Target(f"{module}:{name}", module.rpartition(".")[2]) for name in code.definitions]
        name, rest = path[0], path[1:]
        targets = [_Target(f"{module}:{name}", ".".join(path), rest)] if name in code.definitions else []
        for source, inside in code.imports.get(name, ()):
            targets += self.follow(source, (*inside, *rest))
        if not targets and f"{module}.{name}" in self.files:
            targets = self.follow(f"{module}.{name}", rest)
        return targets or [_Target(None, ".".join(path), rest)]

    def definition(self, key: str) -> _Definition:
        module, _, name = key.partition(":")
        return self.module(module).definitions[name]

    def module(self, name: str) -> _Module:
        return _module(name, self.files[name])


_code = cache(_Code)


@cache
def _walked(roots: frozenset[str], cut: frozenset[str], files: frozenset) -> tuple[dict[str, str], str]:
    code = _code(files)
    stops = {".".join((target.key, *target.attributes)) for name in cut for target in code.named(name)}
    keys = code.reach([target for name in roots for target in code.named(name)], stops)
    digests = {key: code.digest(key) for key in sorted(keys)}
    return digests, code.hash(digests)


def _files(roots: set[str]) -> frozenset[tuple[str, File | None]]:
    """Return the modules whose code counts, with their files: None for a folder without __init__.py."""
    paths = {root: getattr(sys.modules.get(root), "__file__", None) for root in roots}  # if it was loaded by its path
    folders: set[str] = set()
    for name in OWN | {root.partition(".")[0] for root in roots}:
        with suppress(ValueError):  # scripts have no spec
            if spec := importlib.util.find_spec(name):  # of a dotted name it would run the package
                paths[name] = spec.origin
                for top in spec.submodule_search_locations or ():
                    for folder, _, files in os.walk(top):
                        package = ".".join([name, *Path(folder).relative_to(top).parts])
                        folders.add(package)
                        for file in files:
                            paths[f"{package}.{file}".removesuffix(".py").removesuffix(".__init__")] = (
                                f"{folder}/{file}"
                            )
    there = ((name, path, os.stat(path)) for name, path in paths.items() if path and path.endswith(".py"))
    found = {name: (path, state.st_mtime_ns, state.st_size) for name, path, state in there}
    return frozenset((dict.fromkeys(folders) | found).items())


class _Module:
    """Hold what a file defines and imports."""

    def __init__(self, name: str, file: File | None):
        is_package = file is not None and file[0].endswith("__init__.py")
        self.package = name if is_package else name.rpartition(".")[0]
        self.definitions: dict[str, _Definition] = {}
        self.statements: list[str] = []  # names of those that do more than define
        source = Path(file[0]).read_text(encoding="utf-8") if file else ""
        self.lines, body = source.split("\n"), ast.parse(source).body
        blocks = [statement for statement in body if not isinstance(statement, (*FUNCTIONS, ast.ClassDef))]
        self.imports = _imports(blocks, self.package)
        for statement in body:
            if not _is_idle(statement):
                self.add(statement)

    def add(self, statement: ast.stmt) -> None:
        """Index a statement by the names it binds. A block or a loop counts as a whole for each of its names."""
        names, functions = _bound(statement), []
        if not names or not isinstance(statement, DEFINITIONS):
            self.statements.append(f"<statement {len(self.statements) + 1}>")
            names.add(self.statements[-1])
        if isinstance(statement, ast.ClassDef):
            functions = [item for item in statement.body if isinstance(item, FUNCTIONS)]
            statement.body = [item for item in statement.body if not isinstance(item, FUNCTIONS)]
        methods = frozenset(function.name for function in functions)
        for name in names:
            self.write(name, statement, methods)
        for function in functions:
            self.write(f"{statement.name}.{function.name}", function)

    def write(self, name: str, node: ast.stmt, methods: frozenset[str] = frozenset()) -> None:
        definition = self.definitions.setdefault(name, _Definition())
        definition.imports |= (imports := _imports([node], self.package))
        definition.write(node, _not_local(self.table(node), methods) | imports.keys() | methods)
        if isinstance(node, ast.ClassDef):
            definition.is_class, definition.methods = True, definition.methods | methods
            # a class body says `other_name = method`
            definition.words |= methods & {piece[0] for piece in definition.pieces if isinstance(piece, tuple)}
            bases = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)  # Generic[T]
            definition.bases += [_path(base) or ("unknown",) for base in bases]

    def table(self, node: ast.stmt) -> SymbolTable:
        """Return Python's symbol tables of a statement, which tell local names from global ones."""
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        source = "\n".join(["if 1:" if node.col_offset else "", *self.lines[first - 1 : node.end_lineno]])
        return symtable(source, "", "exec")


_module = cache(_Module)


class _Definition:
    """Hold the statements that make up one name, as text and the names in it that are defined elsewhere."""

    def __init__(self) -> None:
        self.pieces: list[str | Dotted] = []
        self.imports: Imports = {}  # inside it
        self.words: set[str] = set()  # attributes and strings: each may name a method
        self.is_class = False
        self.bases: list[Dotted] = []
        self.methods: set[str] = set()

    def write(self, node: Any, variables: set[str]) -> None:
        """Write a node or a constant, the same in every version of Python, unlike ast.dump."""
        path = _path(node)
        if path and path[0] in variables:
            self.pieces.append(path)
            return
        if not isinstance(node, ast.AST):
            self.pieces.append(f"{node!a},")
            return
        word = getattr(node, "attr", getattr(node, "value", None))
        if isinstance(word, str):
            self.words.add(word)
        self.pieces.append(f"{type(node).__name__}(")
        for field in node._fields:
            value = getattr(node, field, None)
            items = [item for item in (value if isinstance(value, list) else [value]) if not _is_idle(item)]
            if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty strings into format specifications
                items = [item for item in items if getattr(item, "value", None) != ""]
            if items and value is not None and field not in IGNORED:
                self.pieces.append(f"{field}=")
                for item in items:
                    self.write(item, variables)
        self.pieces.append(")")


def _path(node: Any) -> Dotted:
    """Return the names of `a.b.c`, and none for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else ()


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds in its module, other than by an import."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    nodes = list(ast.walk(statement))
    variables = {name for node in nodes if isinstance(node, ast.comprehension) for name in ast.walk(node.target)}
    stored = {node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {node.id for node in stored - variables} | {
        node.name for node in nodes if isinstance(node, (*FUNCTIONS, ast.ClassDef))
    }


def _not_local(table: SymbolTable, methods: frozenset[str] = frozenset()) -> set[str]:
    """Return the names that a statement takes from elsewhere, in all its scopes but those of the methods."""
    # Python 3.12 adds the variables of comprehensions to the scope around them: assigned, so that these must not count
    names = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if (symbol.is_referenced() and not symbol.is_assigned() if table.get_type() == "module" else symbol.is_global())
    }
    scopes = (scope for scope in table.get_children() if scope.get_name() not in methods)
    return names.union(*(_not_local(scope, methods) for scope in scopes))


def _is_idle(node: Any) -> bool:
    """Say whether digests leave a statement out: an import, a docstring, `pass` or `...`."""
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass))


def _imports(nodes: Iterable[ast.AST], package: str) -> Imports:
    imports: Imports = {}
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            name = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: 1 - node.level or None] if node.level else []
                source = ".".join([*parents, *filter(None, [node.module])]), (alias.name,)
            elif alias.asname:
                source = alias.name, ()
            else:  # `import a.b` binds a
                name = alias.name.partition(".")[0]
                source = name, ()
            imports[name] = (*imports.get(name, ()), source)
    return imports


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
