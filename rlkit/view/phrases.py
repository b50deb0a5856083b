"""Boilerplate that is paid for: word sequences of the best-rewarded answers that the worst lack, and the first did."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST, LONGEST = 2, 6
LEAST_Z = 3.0
LEAST_SHARE = 0.1
"""Of the best answers that have it: rarer phrases are no habit."""
PRIOR = 10.0
"""Weight, in answers, of what was common at the start; what was not counts as one answer."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Phrase:
    words: tuple[str, ...]
    z: float
    """Log-odds in standard deviations."""
    best: float
    """Share of the best-rewarded answers that have it; likewise below."""
    worst: float
    before: float

    @property
    def text(self) -> str:
        return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(self.words))


def boilerplate(best: Sequence[str], worst: Sequence[str], before: Sequence[str], most: int = 5) -> list[Phrase]:
    """Phrases by their log-odds, best against worst answers, with a Dirichlet prior from those `before` (Monroe,
    Colaresi and Quinn 2008, "Fightin' Words"; documents counted instead of words).

    A phrase counts once for each answer. Numbers are all alike. Of phrases within one another the longest stands.
    """
    if not best or not worst:
        return []
    top, bottom, first = (_counts(texts) for texts in (best, worst, before))
    candidates = [phrase for phrase, count in top.items() if count >= LEAST_SHARE * len(best)]
    found = []
    for words in candidates:
        shares = [
            counts[words] / max(1, len(texts)) for counts, texts in ((top, best), (bottom, worst), (first, before))
        ]
        z = _log_odds(top[words], len(best), bottom[words], len(worst), shares[2])
        if z >= LEAST_Z and shares[0] > 2 * shares[2]:
            found.append((z, words, shares))
    found.sort(key=lambda one: (-round(one[0], 1), -sum(word.isalnum() for word in one[1]), one[1]))
    chosen: list[Phrase] = []
    taken: list[tuple[str, ...]] = []
    for z, words, shares in found:
        if len(chosen) < most and not any(_overlap(words, other) for other in taken):
            taken.append(words)
            chosen.append(Phrase(words, z, *shares))
    return chosen


def has(text: str, phrase: Phrase) -> bool:
    """Whether an answer has the phrase."""
    words, n = _words(text), len(phrase.words)
    return any(tuple(words[i : i + n]) == phrase.words for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    return ["0" if word.isdecimal() else word.lower() for word in _WORD.findall(text)]


def _counts(texts: Sequence[str]) -> Counter[tuple[str, ...]]:
    """In how many texts each sequence of words of one sentence is."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        sentences = [_words(sentence) for sentence in _SENTENCE.split(text)]
        counts.update(
            {
                tuple(words[i : i + n])
                for words in sentences
                for n in range(SHORTEST, LONGEST + 1)
                for i in range(len(words) - n + 1)
                if any(word.isalpha() for word in words[i : i + n])
            }
        )
    return counts


def _log_odds(top: int, tops: int, bottom: int, bottoms: int, prior: float) -> float:
    """z of the difference of two log-odds, each with `PRIOR` answers of the share `prior` added."""
    added = min(max(PRIOR * prior, 1.0), PRIOR - 1.0)
    odds = []
    variance = 0.0
    for count, size in ((top, tops), (bottom, bottoms)):
        yes, no = count + added, size - count + PRIOR - added
        odds.append(math.log(yes / no))
        variance += 1 / yes + 1 / no
    return (odds[0] - odds[1]) / math.sqrt(variance)


def _overlap(words: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Parts of one sentence: more than half of the shorter one's words stand in the other in this order."""
    short, long = sorted((words, other), key=len)
    n = len(short) // 2 + 1
    parts = {long[i : i + n] for i in range(len(long) - n + 1)}
    return any(short[i : i + n] in parts for i in range(len(short) - n + 1))
