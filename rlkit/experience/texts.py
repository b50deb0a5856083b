"""Texts that cannot be written as UTF-8."""

from __future__ import annotations


def encodable(text: str) -> str:
    """The text, as long as before, with `?` for halves of characters (lone surrogates), which neither UTF-8 nor a
    tokenizer takes."""
    return text.encode(errors="replace").decode()
