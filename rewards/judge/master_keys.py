"""Responses without content that fool judges ("master keys", arXiv 2507.08794), found by rule."""

from __future__ import annotations

import unicodedata

MASTER_KEYS = (
    ":",
    ".",
    " ",
    "Thought process:",
    "Let's solve this problem step by step.",
    "Solution",
    "解",
    "かいせつ",
    "Respuesta",
)
"""What the paper found to be judged right by many judges; the probe at the start sends these."""

PHRASES = (
    *MASTER_KEYS,
    "Let's think step by step.",
    "Let us solve this step by step.",
    "Here is the solution:",
    "The solution is:",
    "Step by step solution:",
    "Answer:",
    "The answer is:",
    "The final answer is:",
    "Final answer:",
    "Reasoning:",
    "Explanation:",
    "Step 1:",
    "Lösung",
    "Antwort",
    "Solución",
    "Réponse",
    "Risposta",
    "Ответ",
    "Решение",
    "答案",
    "解答",
    "解题步骤",
    "답",
)
"""Openings that announce an answer and give none: the paper's and our own."""


def words(text: str) -> tuple[str, ...]:
    """Letters and digits, lower case, split at everything else."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return tuple("".join(c if c.isalnum() else " " for c in plain).split())


_PHRASES = sorted({found for phrase in PHRASES if (found := words(phrase))}, key=len, reverse=True)


def trivial(response: str, min_alphanumerics: int = 1) -> str:
    """Why the response has no content, or an empty string.

    It has none if it has too few letters and digits, if it is nothing but announcements (one or several), or if it
    is an announcement of several words that breaks off.
    """
    found = words(response)
    if sum(map(len, found)) < min_alphanumerics:
        return f"fewer than {min_alphanumerics} letters or digits"
    left = found
    while left:
        phrase = next((phrase for phrase in _PHRASES if left[: len(phrase)] == phrase), None)
        if phrase is None:
            break
        left = left[len(phrase) :]
    if not left:
        return "announces an answer and gives none"
    if len(left) > 1 and any(phrase[: len(left)] == left for phrase in _PHRASES):
        return "an announcement that breaks off"
    return ""
