"""Constraints on the layout, the beginning and the end of a text, named as in IFEval (arXiv 2311.07911)."""

from __future__ import annotations

import re

from rewards.rule.json_schema import read_json

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_HIGHLIGHT = re.compile(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*")
_TITLE = re.compile(r"<<([^<>\n]+)>>")
_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def number_of_placeholders(text: str, *, num_placeholders: float) -> bool:
    """At least so many placeholders in square brackets."""
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript that starts with `P.S.` or `P.P.S`, and has words."""
    marker = postscript_marker.strip()
    letters = re.sub(r"[.\s]", "", marker).upper()
    if letters in ("PS", "PPS"):
        pattern = r"\.?\s?".join(letters) + r"\.?"
    else:
        pattern = re.escape(marker)
    return re.search(rf"(?<!\w){pattern}[\s:,-]*\w", text, re.IGNORECASE) is not None


def number_of_bullets(text: str, *, num_bullets: float) -> bool:
    """Exactly so many lines that start with `*` or `-`, as Markdown lists do."""
    bullets = [line for line in text.splitlines() if re.match(r"\s*(?:\*(?!\*)|-(?!-))\s*\S", line)]
    return len(bullets) == num_bullets


def constrained_response(text: str) -> bool:
    """Contains one of the three fixed answers of IFEval (`My answer is yes.`, `... no.`, `... maybe.`)."""
    return any(answer in text for answer in _FIXED_ANSWERS)


def number_of_highlights(text: str, *, num_highlights: float) -> bool:
    """At least so many parts in `*...*` or `**...**`."""
    return sum(bool(part.strip("* ")) for part in _HIGHLIGHT.findall(text)) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: float) -> bool:
    """At least so many sections headed by this word and a number (`Section 1`). IFEval spells the argument so."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole response is JSON, possibly inside one fenced block."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and len(body) >= 6:
        body = re.sub(r"^```(?:json)?", "", body, count=1, flags=re.IGNORECASE).removesuffix("```")
    return "```" not in body and read_json(body) is not None


def title(text: str) -> bool:
    """A title in double angular brackets."""
    return any(inside.strip() for inside in _TITLE.findall(text))


def two_responses(text: str) -> bool:
    """Two different answers, divided by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """Starts with this text."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """Ends with this phrase; quotation marks around it do not matter."""
    return text.strip().strip('"').rstrip().lower().endswith(end_phrase.strip().strip('"').lower())


def quotation(text: str) -> bool:
    """The whole response stands in double quotation marks."""
    body = text.strip()
    return len(body) > 2 and body.startswith('"') and body.endswith('"')
