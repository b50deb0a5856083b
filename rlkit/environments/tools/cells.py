"""Sent to the sandbox as text, where it runs cells in one namespace and shows only the output of the last."""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import sys
import traceback
import types


def run(cells: list[str], ended: str) -> None:
    """Run the cells, and write `ended` after the output of the last if it ran to its end, even with an exception."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    heard = [os.dup(1), os.dup(2)]
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    for number, cell in enumerate(cells):
        if number == len(cells) - 1:
            _flush()
            os.dup2(heard[0], 1)
            os.dup2(heard[1], 2)
        _run_cell(cell, f"cell {number + 1}", module.__dict__)
    _flush()
    os.write(1, ended.encode())


def _run_cell(cell: str, name: str, names: dict[str, object]) -> None:
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)  # so that tracebacks show its lines
    try:
        tree = ast.parse(cell, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), names)
            if value is not None:
                print(repr(value))
    except SystemExit as error:
        if error.code not in (None, 0):
            print(f"SystemExit: {error.code}", file=sys.stderr)
    except BaseException as error:
        stack = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in stack if frame.filename != run.__code__.co_filename]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(own)] if own else []
        sys.stderr.write("".join([*lines, *traceback.format_exception_only(error)]))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a cell may have closed it
            stream.flush()
