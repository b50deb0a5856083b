"""Texts that cannot be written as UTF-8."""

from __future__ import annotations


def encodable(text: str) -> str:
    """Return the text, equally long, with `?` for half characters (lone surrogates), which neither UTF-8 nor a
    tokenizer accepts."""
    return text.encode(errors="replace").decode()
