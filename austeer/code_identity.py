"""Hash the code behind a result: the definitions that given classes and functions reach by name, and no others.

    code_hash(run_cell, type(method), type(task), type(model), cut={"austeer.methods.registry:METHODS"})

A comment, a docstring, the form of an import, the file that holds a definition, and code that is not reached change
nothing; a line of a reached definition changes the hash. Sources are read, never imported. Names that are put together
at run time are not seen: give such classes as roots, and let a module with a lazy `__getattr__` repeat its imports
under `if TYPE_CHECKING`.
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
from typing import Any, NamedTuple

# top-level names whose code counts; those of the roots' own modules are added
OWN = frozenset({"austeer", "rmodels", "eval", "experiments", "embedded", "paper", "MFU_screening", "set_MFU"})
# bases that, like builtins, call no method by a name of their own, special methods aside
PLAIN = {"ABC", "Enum", "Flag", "Generic", "IntEnum", "IntFlag", "NamedTuple", "Protocol", "StrEnum", "TypedDict"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda, *COMPREHENSIONS)
OUTSIDE = {"args", "bases", "decorator_list", "keywords", "returns"}  # fields evaluated outside the scope they open
IGNORED = {"ctx", "kind", "type_comment", "type_params"}  # the last one is new in Python 3.12

Root = type | Callable | str
Dotted = tuple[str, ...]  # a.b.c
Sources = tuple[tuple[str, Dotted], ...]  # what a name means, as (module, names inside it); () for a variable


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
    own = OWN | {name.partition(":")[0].partition(".")[0] for name in names}
    if own not in _CODE or _CODE[own].is_stale():
        _CODE[own] = _Code(own)
    return _CODE[own].walk(names, frozenset(cut))


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

    def __init__(self, own: frozenset[str]):
        self.own = own
        self.places: dict[str, _Place | None] = {}
        self.meanings: dict[tuple[str, Dotted], list[_Target]] = {}
        self.digests: dict[str, str] = {}
        self.walks: dict[tuple, tuple[dict[str, str], str]] = {}

    def is_stale(self) -> bool:
        today = _Code(self.own)
        return any(today.place(module) != place for module, place in self.places.items())

    def walk(self, roots: frozenset[str], cut: frozenset[str]) -> tuple[dict[str, str], str]:
        if (roots, cut) not in self.walks:
            stops = {".".join((target.key, *target.attributes)) for name in cut for target in self.named(name)}
            keys = self.reach([target for name in roots for target in self.named(name)], stops)
            self.walks[roots, cut] = {key: self.digest(key) for key in sorted(keys)}, self.hash(keys)
        return self.walks[roots, cut]

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
        classes = [key for key in keys if self.definition(key).is_class]
        framework_classes = set().union(*map(self.framework_family, classes))
        for key in classes:
            for name in self.definition(key).methods:
                if key in framework_classes or name in words or (name.startswith("_") and name.endswith("_")):
                    yield f"{key}.{name}"

    def framework_family(self, key: str) -> set[str]:
        """Return a class and its ancestors here, mixins too, if one of the bases is a framework's."""
        family: set[str] = set()
        is_foreign, bases = False, [_Target(key)]
        while bases:
            base = bases.pop()
            if not base.key or not self.definition(base.key).is_class:
                name = base.text.rpartition(".")[2]
                is_foreign |= name not in PLAIN and not hasattr(builtins, name)
            elif base.key not in family:
                family.add(base.key)
                bases += self.resolve(*self.definition(base.key).bases)
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

    def hash(self, keys: set[str]) -> str:
        """Hash the set of digests, each with those of what it names, and of what that names, three steps deep.

        The digests alone would not tell a.f from b.f where both are used, nor say which class a method belongs to.
        """
        labels = {key: self.digest(key) for key in keys}
        edges = {key: [key, *self.edges(key, keys)] for key in keys}
        for _ in range(3):
            labels = {key: _sha(" ".join(labels[name] for name in edges[key])) for key in keys}
        return _sha(" ".join(sorted(set(labels.values()))))

    def edges(self, key: str, keys: set[str]) -> Iterator[str]:
        """Yield what a definition names, in its order, and the methods of a class."""
        yield from (target.key for target in self.targets(key) if target.key in keys)
        yield from (f"{key}.{name}" for name in sorted(self.definition(key).methods) if f"{key}.{name}" in keys)

    def digest(self, key: str) -> str:
        if key not in self.digests:
            texts = [
                piece if isinstance(piece, str) else f"<{sorted({target.text for target in self.resolve(piece)})}>"
                for piece in self.definition(key).pieces
            ]
            self.digests[key] = _sha("".join(texts))
        return self.digests[key]

    def targets(self, key: str) -> list[_Target]:
        return self.resolve(*self.definition(key).names)

    def resolve(self, *names: Sources) -> list[_Target]:
        return [target for sources in names for module, path in sources for target in self.follow(module, path)]

    def follow(self, module: str, path: Dotted) -> list[_Target]:
        """Return what a path means in a module, behind all imports."""
        if (module, path) not in self.meanings:
            self.meanings[module, path] = []  # the answer where imports go in a circle
            self.meanings[module, path] = self._follow(module, path)
        return self.meanings[module, path]

    def _follow(self, module: str, path: Dotted) -> list[_Target]:
        place = self.place(module)
        if not place:
            return [_Target(None, ".".join((module, *path)))]
        code = self.module(module)
        if not path:  # a module as a value: whoever has it may use all of it
            return [_Target(f"{module}:{name}", module.rpartition(".")[2]) for name in code.definitions]
        name, rest = path[0], path[1:]
        targets = [_Target(f"{module}:{name}", ".".join(path), rest)] if name in code.definitions else []
        targets += self.resolve(_extended(code.imports.get(name, ()), rest))
        if not targets:  # from other import *
            others = self.resolve(tuple((other, path) for other, _ in code.imports.get("*", ())))
            targets = [target for target in others if target.key]
        if not targets and place.folders and self.place(f"{module}.{name}"):
            targets = self.follow(f"{module}.{name}", rest)
        return targets or [_Target(None, ".".join(path), rest)]

    def definition(self, key: str) -> _Definition:
        module, _, name = key.partition(":")
        return self.module(module).definitions[name]

    def module(self, name: str) -> _Module:
        return _module(name, self.place(name))

    def place(self, module: str) -> _Place | None:
        if module.partition(".")[0] not in self.own:
            return None
        if module not in self.places:
            package = self.place(module.rpartition(".")[0]) if "." in module else None
            self.places[module] = _find(module, package.folders if package else ())
        return self.places[module]


_CODE: dict[frozenset[str], _Code] = {}


class _Place(NamedTuple):
    """Say where a module is, and in which state its file."""

    file: str | None  # None for a folder without __init__.py
    folders: tuple[str, ...]  # of a package
    stamp: tuple[int, int] | None


def _find(module: str, folders: tuple[str, ...]) -> _Place | None:
    """Find a module in the folders of its package, or by import where it is in none."""
    paths = [f"{folder}/{module.rpartition('.')[2]}" for folder in folders]
    files = [choice for path in paths for choice in ((f"{path}/__init__.py", (path,)), (f"{path}.py", ()))]
    if "." not in module:  # find_spec of a dotted name would run the package
        with suppress(ValueError):  # scripts have no spec
            if spec := importlib.util.find_spec(module):
                paths = list(spec.submodule_search_locations or ())
                files = [(spec.origin, tuple(paths))]
    files.append((getattr(sys.modules.get(module), "__file__", None), ()))  # loaded by its path
    for file, inside in files:
        if file and file.endswith(".py") and os.path.exists(file):
            status = os.stat(file)
            return _Place(file, inside, (status.st_mtime_ns, status.st_size))
    namespace = tuple(filter(os.path.isdir, paths))
    return _Place(None, namespace, None) if namespace else None


class _Module:
    """Hold what a file defines and imports."""

    def __init__(self, name: str, place: _Place):
        self.name, self.package = name, name if place.folders else name.rpartition(".")[0]
        self.definitions: dict[str, _Definition] = {}
        self.statements: list[str] = []  # names of statements that do more than define
        body = _parse(place.file) if place.file else []
        self.imports = _imports(_inside(body), self.package)
        for statement in body:
            if not _is_idle(statement):
                self.add(statement)

    def add(self, statement: ast.stmt) -> None:
        """Index a statement by the names it binds. A block or a loop counts as a whole for each of its names."""
        names = set(_bound(_inside([statement])))
        if not names or not isinstance(statement, DEFINITIONS):
            self.statements.append(f"<statement {len(self.statements) + 1}>")
            names.add(self.statements[-1])
        for name in names:
            if isinstance(statement, ast.ClassDef):
                self.add_class(self.definition(name), statement)
            else:
                self.definition(name).write(statement, {})

    def add_class(self, definition: _Definition, node: ast.ClassDef) -> None:
        definition.is_class = True
        functions = [item for item in node.body if isinstance(item, FUNCTIONS)]
        node.body = [item for item in node.body if not isinstance(item, FUNCTIONS)]
        definition.write(node, {})
        for function in functions:
            definition.methods.add(function.name)
            self.definition(f"{node.name}.{function.name}").write(function, {})
        for base in node.bases:
            path = _path(base.value if isinstance(base, ast.Subscript) else base)  # Generic[T]
            definition.bases.append(definition.sources(path or ("unknown",), {}))
        names = {path[0] for sources in definition.names for _, path in sources if path}
        definition.words |= definition.methods & names  # a class body says `other_name = method`

    def definition(self, name: str) -> _Definition:
        return self.definitions.setdefault(name, _Definition(self.name, self.package))


_module = cache(_Module)


def _parse(file: str) -> list[ast.stmt]:
    with open(file, "rb") as source:
        return ast.parse(source.read(), file).body


class _Definition:
    """Hold the statements that make up one name, as text and the names in it that are defined elsewhere."""

    def __init__(self, module: str, package: str):
        self.module, self.package = module, package
        self.pieces: list[str | Sources] = []
        self.names: list[Sources] = []
        self.words: set[str] = set()  # attributes and strings: each may name a method
        self.is_class = False
        self.bases: list[Sources] = []
        self.methods: set[str] = set()

    def write(self, node: Any, scope: dict[str, Sources]) -> None:
        """Write a node or a constant, the same in every version of Python, unlike ast.dump."""
        path = _path(node)
        if path and scope.get(path[0]) != ():
            self.names.append(self.sources(path, scope))
            self.pieces.append(self.names[-1])
        elif isinstance(node, ast.AST):
            self.pieces.append(f"{type(node).__name__}(")
            self.write_fields(node, scope)
            self.pieces.append(")")
        else:
            self.pieces.append(f"{node!a},")

    def sources(self, path: Dotted, scope: dict[str, Sources]) -> Sources:
        return _extended(scope.get(path[0], ((self.module, path[:1]),)), path[1:])

    def write_fields(self, node: ast.AST, scope: dict[str, Sources]) -> None:
        inner_scope = scope
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            inner_scope = {**scope, **_variables(node, self.package)}
        elif isinstance(node, ast.ClassDef):
            inner_scope = {**scope, **_imports(_inside(node.body), self.package)}
        elif isinstance(node, COMPREHENSIONS):
            self.write(node.generators[0].iter, scope)  # once more, since it is evaluated outside
            targets = _inside(part.target for part in node.generators)
            inner_scope = {**scope, **dict.fromkeys(_bound(targets), ())}
        elif isinstance(node, ast.Attribute):
            self.words.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.words.add(node.value)
        for field in node._fields:
            value = getattr(node, field, None)
            items = [item for item in (value if isinstance(value, list) else [value]) if not _is_idle(item)]
            if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty strings into format specifications
                items = [item for item in items if not (isinstance(item, ast.Constant) and item.value == "")]
            if items and value is not None and field not in IGNORED:
                self.pieces.append(f"{field}=")
                for item in items:
                    part = _unquoted(item) if field in ("annotation", "returns") else item
                    self.write(part, scope if field in OUTSIDE else inner_scope)


def _path(node: Any) -> Dotted:
    """Return the names of `a.b.c`, and none for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else ()


def _extended(sources: Sources, names: Dotted) -> Sources:
    return tuple((module, (*path, *names)) for module, path in sources)


def _unquoted(annotation: Any) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        with suppress(SyntaxError):
            return ast.parse(annotation.value, mode="eval").body
    return annotation


def _is_idle(node: Any) -> bool:
    """Say whether digests leave a statement out: an import, a docstring, `pass` or `...`."""
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass))


def _variables(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, package: str) -> dict[str, Sources]:
    """Return the names that are the function's own, with the sources of those it imports."""
    nodes = list(_inside(function.body if isinstance(function.body, list) else [function.body]))
    arguments = (node.arg for node in ast.iter_child_nodes(function.args) if isinstance(node, ast.arg))
    not_own = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    return {**dict.fromkeys({*arguments, *_bound(nodes)} - not_own, ()), **_imports(nodes, package)}


def _bound(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the names that the nodes of a scope bind, other than by an import."""
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler)) and node.name:
            yield node.name


def _imports(nodes: Iterable[ast.AST], package: str) -> dict[str, Sources]:
    imports: dict[str, Sources] = {}
    for node in nodes:
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


def _inside(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes of a scope: not those within its functions, classes and comprehensions."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, SCOPES):
            todo += ast.iter_child_nodes(node)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
