"""Describes the code in numbers: files, lines, import share, circles, length of the core path, docstring words.

    python benchmarks/structure.py              # this checkout
    python benchmarks/structure.py ../older     # another one, for before and after

Counts `rlkit`, `rewards` and `algorithms` without tests and examples. An import counts wherever it is: at the top,
inside a function, or under TYPE_CHECKING. A package is a folder or file directly under one of the three roots. The core
path is the reading list of README.md: the files that one training step goes through. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOTS = ("rlkit", "rewards", "algorithms")
PATH_IN_README = re.compile(r"\]\(((?:rlkit|rewards|algorithms)/[\w/]+\.py)\)")
Graph = dict[str, set[str]]


def modules(checkout: Path) -> dict[str, Path]:
    """Return dotted name -> file of every module of the three packages."""
    files = [file for root in ROOTS for file in sorted((checkout / root).rglob("*.py"))]
    return {
        ".".join(file.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__"): file for file in files
    }


def imports(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield (module, lines of the statement) of every import; the module is empty for imports of other projects."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in whole]
        for i, name in enumerate(dict.fromkeys(names)):
            yield name if name in known else "", lines if i == 0 else 0


def docstring_words(tree: ast.Module) -> int:
    """Count the words of all docstrings, including those under fields."""
    texts = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return sum(len(text.split()) for text in texts)


def package(module: str, known: Mapping[str, Path]) -> str:
    """Return `rlkit.learner` for `rlkit.learner.policy`; a module directly under a root is its own package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 or known[module].name == "__init__.py" else module


def circles(graph: Graph) -> list[list[str]]:
    """Return strongly connected components of more than one node, whose nodes can all reach each other."""

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for following in graph.get(todo.pop(), set()) - seen:
                seen.add(following)
                todo.append(following)
        return seen

    reach = {node: reachable(node) for node in graph}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def core_path(checkout: Path) -> list[Path]:
    """Return the files on README.md's reading list; empty if it has no such list."""
    text = (checkout / "README.md").read_text()
    _, _, section = text.partition("## Read the core")
    return [checkout / name for name in dict.fromkeys(PATH_IN_README.findall(section.partition("\n## ")[0]))]


def measure(checkout: Path) -> dict[str, object]:
    """Return all numbers of one checkout."""
    known = modules(checkout)
    lengths: dict[str, int] = {}
    import_lines = words = 0
    files: Graph = {name: set() for name in known}
    for name, file in known.items():
        text = file.read_text()
        tree = ast.parse(text)
        lengths[name] = len(text.splitlines())
        words += docstring_words(tree)
        for imported, lines in imports(tree, known):
            import_lines += lines
            if imported and imported != name:
                files[name].add(imported)
    packages: Graph = {package(name, known): set() for name in known}
    for name, imported_names in files.items():
        packages[package(name, known)] |= {package(other, known) for other in imported_names} - {package(name, known)}
    total = sum(lengths.values())
    return {
        "files": len(known),
        "lines": total,
        "median_file": statistics.median(lengths.values()),
        "longest_file": max(lengths.values()),
        "import_share": round(import_lines / total, 4),
        "files_in_circles": sum(map(len, circles(files))),
        "packages_in_circles": sum(map(len, circles(packages))),
        "docstring_words": words,
        "docstring_words_per_line": round(words / total, 3),
        "core_path_files": len(core_path(checkout)),
        "core_path_lines": sum(len(file.read_text().splitlines()) for file in core_path(checkout)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    print(json.dumps(measure(parser.parse_args().checkout)))


if __name__ == "__main__":
    main()
