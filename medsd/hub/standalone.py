"""`pipeline.py`: the pipeline's own sources in one file, for machines without medsd.

*Assembled*, never copied by hand: from one class on, every function, class and constant of medsd that it needs, in the text of its own
module, below the imports of other packages. `in_one_file` is the one place where an import of medsd is rewritten: it goes, since what it
named stands in the same file. So two of these names may not be the same, and a module may not be used as a whole.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import medsd

PACKAGE = Path(medsd.__file__).parent
ROOT, NAME = "medsd.inference.core", "DiffusionClassifierPipeline"
HEAD = '''"""{name}: generates medical images by class, and scores how likely each class is for an image; without medsd.

    pipe = DiffusionPipeline.from_pretrained(REPOSITORY, custom_pipeline=REPOSITORY, trust_remote_code=True)
    pipe(class_name=pipe.class_names[0]).images
    pipe.classify([array]).probabilities    # arrays (channels, height, width) in the unit of pipe.data

Assembled by medsd {version} from its own modules: change those, not this. Apache-2.0. Not for clinical use.
"""
'''


@dataclass(frozen=True)
class Definition:
    """A top-level statement of a module that binds names, with the string below it that describes it."""

    names: tuple[str, ...]
    node: ast.stmt
    last_line: int


@dataclass
class Module:
    """A module of medsd: its text, what it defines, and what its imports call what."""

    name: str
    text: str
    definitions: list[Definition] = field(default_factory=list)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here -> (module of medsd, name there)."""
    others: dict[str, str] = field(default_factory=dict)
    """Name here -> the line that imports it from another package."""

    def find(self, name: str) -> Definition | None:
        """What defines a name here."""
        return next((definition for definition in self.definitions if name in definition.names), None)


@cache
def read_module(name: str) -> Module:
    """Parse a module of medsd, without running it."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    body, module = ast.parse(text).body, Module(name, text)
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Import | ast.ImportFrom):
            ours, others = imported(node)
            module.ours |= ours
            module.others |= others
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For) and not _for_types(node):
            raise ValueError(f"{name} binds names within a statement at its top (line {node.lineno}): define them plainly")
        elif names := tuple(bound(node)):
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            last = following if described and isinstance(node, ast.Assign | ast.AnnAssign) else node
            module.definitions.append(Definition(names, node, last.end_lineno))
    return module


def _for_types(node: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:`, whose names only annotations in quotes use."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def bound(node: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def imported(node: ast.Import | ast.ImportFrom) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """What an import binds: names of medsd, as (module, name), and of other packages, as the line that imports each."""
    if isinstance(node, ast.Import):
        return {}, {alias.asname or alias.name.split(".")[0]: f"import {alias.name}" + _as(alias) for alias in node.names}
    if node.module.split(".")[0] == "medsd":
        if renamed := next((alias.name for alias in node.names if alias.asname), None):
            raise ValueError(f"{node.module}.{renamed} is imported under another name, which one file does not know: keep its own")
        return {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}, {}
    return {}, {alias.asname or alias.name: f"from {node.module} import {alias.name}" + _as(alias) for alias in node.names}


def _as(alias: ast.alias) -> str:
    return f" as {alias.asname}" if alias.asname else ""


def pipeline_source() -> str:
    """The text of `pipeline.py`."""
    return in_one_file(ROOT, NAME)


def in_one_file(root: str, name: str) -> str:
    """Everything that `root.name` needs of medsd, in one text; raises ValueError where two of its names are the same."""
    needed = reached(root, name)
    order = dependency_order({module for module, _ in needed})
    lines: set[str] = set()
    texts: list[str] = []
    owners: dict[str, str] = {}
    for module in map(read_module, order):
        for definition in module.definitions:
            if not any((module.name, own) in needed for own in definition.names):
                continue
            for own in definition.names:
                if owners.setdefault(own, module.name) != module.name:
                    raise ValueError(f"{own} is a name in {owners[own]} and in {module.name}: one file cannot hold both")
            lines |= {module.others[used] for used in names_in(definition.node) if used in module.others}
            texts.append(without_imports(module, definition))
    for line in lines:
        called = line.split()[-1]
        if called in owners:
            raise ValueError(f"{called} is a name in {owners[called]} and one that `{line}` imports: one file cannot hold both")
    head = HEAD.format(name=name, version=medsd.__version__)
    return "\n".join([head, *grouped(lines), "", "", "\n\n\n".join(texts), ""])


def grouped(lines: set[str]) -> list[str]:
    """Imports, one line a module."""
    of_module: dict[str, list[str]] = {}
    for line in sorted(lines):
        module, _, names = line.partition(" import ")
        of_module.setdefault(module, []).extend([names] if names else [])
    return sorted(f"{module} import {', '.join(names)}" if names else module for module, names in of_module.items())


def reached(root: str, name: str) -> set[tuple[str, str]]:
    """Names of medsd that `root.name` needs, with their modules, itself among them."""
    found: set[tuple[str, str]] = set()
    waiting = [(root, name)]
    while waiting:
        module_name, wanted = waiting.pop()
        module = read_module(module_name)
        if wanted in module.ours:  # A name that the module itself imports.
            waiting.append(module.ours[wanted])
            continue
        definition = module.find(wanted)
        if definition is None:
            raise ValueError(f"{module_name} does not define {wanted}, which is needed in one file; use its names, not the module")
        if (module_name, wanted) in found:
            continue
        found |= {(module_name, own) for own in definition.names}
        own_imports = {here: there for node in inner_imports(definition.node) for here, there in imported(node)[0].items()}
        for used in names_in(definition.node):
            if used in own_imports or used in module.ours:
                waiting.append(own_imports.get(used) or module.ours[used])
            elif module.find(used) is not None:
                waiting.append((module_name, used))
    return found


def names_in(node: ast.AST) -> set[str]:
    """Every name that is read in a statement."""
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def inner_imports(node: ast.AST) -> list[ast.ImportFrom]:
    """Imports of medsd within a statement."""
    found = [inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom) and inner.module]
    return [inner for inner in found if inner.module.split(".")[0] == "medsd"]


def dependency_order(modules: set[str]) -> list[str]:
    """Modules, each behind those that it imports at its top."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for other in sorted({there for there, _ in read_module(name).ours.values()}):
                visit(other)
            order.append(name)

    for name in sorted(modules):
        visit(name)
    return [name for name in order if name in modules]


def without_imports(module: Module, definition: Definition) -> str:
    """A definition's text, comments and all, less its imports of medsd."""
    node, lines = definition.node, module.text.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    gone = {line for inner in inner_imports(node) for line in range(inner.lineno, inner.end_lineno + 1)}
    for inner in inner_imports(node):  # The empty line behind a function's imports goes with them.
        if not lines[inner.end_lineno].strip() and (inner.lineno - 1 in gone or lines[inner.lineno - 2].rstrip().endswith(('"""', ":"))):
            gone.add(inner.end_lineno + 1)
    return "\n".join(lines[number - 1] for number in range(first, definition.last_line + 1) if number not in gone)
