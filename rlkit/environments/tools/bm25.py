"""BM25 over texts, in numpy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """
    >>> words("Graz, a city (pop. 300,000)")
    ['graz', 'a', 'city', 'pop', '300', '000']
    """
    return _WORD.findall(text.casefold())


class BM25:
    """score(q, d) = sum over words t of q: idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|)), with
    idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5)); Robertson and Zaragoza (2009), in Lucene's form.
    """

    def __init__(self, texts: Iterable[str], k1: float = 1.2, b: float = 0.75) -> None:
        self._vocabulary: dict[str, int] = {}
        terms: list[int] = []
        documents: list[int] = []
        counts: list[int] = []
        lengths: list[int] = []
        for number, text in enumerate(texts):
            of_document = Counter(words(text))
            terms += [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in of_document]
            documents += [number] * len(of_document)
            counts += of_document.values()
            lengths.append(of_document.total())
        order = np.argsort(np.array(terms, dtype=np.int64), kind="stable")
        holding = np.bincount(np.array(terms, dtype=np.int64), minlength=len(self._vocabulary))
        self._starts = np.concatenate([[0], np.cumsum(holding)])
        """Postings of term t: from _starts[t] to _starts[t + 1]."""
        self._documents = np.array(documents, dtype=np.int32)[order]
        frequency = np.array(counts, dtype=np.float64)[order]
        length = np.array(lengths, dtype=np.float64)
        relative = length / max(length.mean(), 1.0) if len(length) else length
        idf = np.log1p((len(length) - holding + 0.5) / (holding + 0.5))
        saturation = k1 * (1 - b + b * relative[self._documents])
        self._weights = np.repeat(idf, holding) * frequency / (frequency + saturation)
        self.size = len(length)

    def scores(self, query: str) -> np.ndarray:
        """Return the scores of all texts [N]; a word that is repeated in the query counts each time."""
        scores = np.zeros(self.size)
        for word, count in Counter(words(query)).items():
            term = self._vocabulary.get(word)
            if term is not None:
                postings = slice(self._starts[term], self._starts[term + 1])
                scores[self._documents[postings]] += count * self._weights[postings]
        return scores

    def best(self, query: str, count: int) -> list[tuple[int, float]]:
        """Return numbers and scores of the best texts that share a word with the query, earlier ones first if equal."""
        scores = self.scores(query)
        matching = np.flatnonzero(scores)
        if len(matching) > count:
            threshold = np.partition(scores[matching], -count)[-count]
            matching = matching[scores[matching] >= threshold]
        order = np.argsort(-scores[matching], kind="stable")[:count]
        return [(int(number), float(scores[number])) for number in matching[order]]
