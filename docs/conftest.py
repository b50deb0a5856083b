"""The Python blocks of the pages are run, page by page in one namespace each; a skipped one says why."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    excludes=["reference/*.md", "reference/*/*.md"],
).pytest()
