"""`reward=math` (and `rule`, `gsm8k`): 1 if the final answer of a response equals the gold answer, else 0.

Numbers, units, percentages and texts are compared here. Expressions are compared by math-verify, in processes that are
killed if they hang.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field

from rewards.base import Reward, RewardTraits
from rewards.verifiers.answers import MARKERS, MAX_ANSWER_CHARACTERS, FinalAnswer, Marker, final_answer, gold_final
from rewards.verifiers.comparison import Pair, decide, is_prose
from rewards.verifiers.pool import Failed, Processes, TextRuleConfig, limit_memory
from rewards.verifiers.symbolic import prepare, verify_pairs
from rlkit.cluster.processes import die_with_parent
from rlkit.experience import Group, GroupScores, Prompt, Score, UserError

LOOKED_AT = 500
"""How many gold answers of a run's data are checked before it starts."""
PROSE_SHARE = 0.05
"""Warn if at least this share of them is prose."""


def _prepare() -> None:
    die_with_parent()
    # math-verify warns that its own time-outs are off, which is intended.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    prepare()  # or the first pair would wait for it
    limit_memory()


class VerifierError(UserError): ...


class Verifier:
    """Judges pairs of cleaned answers and remembers the verdicts.

    >>> verifier = Verifier(processes=1, item_timeout_seconds=5.0, cache_size=1000)
    >>> verifier.verdicts([("1/2", "0.5"), ("3", "4")], budget_seconds=60.0)
    {('1/2', '0.5'): 'right', ('3', '4'): 'wrong'}
    """

    def __init__(
        self, processes: int, item_timeout_seconds: float, cache_size: int, letters_are_units: bool = False
    ) -> None:
        self._processes = Processes(processes, _prepare, ["math_verify", "rewards.verifiers.math"])
        self._item_timeout = item_timeout_seconds
        self._cache_size = cache_size
        self._letters_are_units = letters_are_units
        self._cache: OrderedDict[Pair, str] = OrderedDict()

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Judge two known pairs. Raise VerifierError if that fails."""
        if importlib.util.find_spec("math_verify") is None:
            raise VerifierError("math-verify is not installed: pip install 'math-verify[antlr4_9_3]'")
        probes = {("1/2", "0.5"): "right", ("\\frac{3}{4}", "0.5"): "wrong"}
        verdicts = self._judge(list(probes), time.monotonic() + timeout_seconds, timeout_seconds)
        if verdicts != probes:
            raise VerifierError(f"math-verify does not work in its processes: expected {probes}, got {verdicts}")

    def verdicts(self, pairs: Iterable[Pair], budget_seconds: float) -> dict[Pair, str]:
        """Map (answer, gold) to `right`, `wrong`, `wrong: WHY`, or why there is none (`timeout: ...`, `crash: ...`).

        Takes at most about `budget_seconds`; pairs not reached by then are `timeout: ...`.
        """
        deadline = time.monotonic() + budget_seconds
        known: dict[Pair, str] = {}
        reduced: dict[Pair, Pair] = {}
        for pair in dict.fromkeys(pairs):
            verdict = self._remembered(pair) or decide(*pair, self._letters_are_units)
            if isinstance(verdict, str):
                known[pair] = verdict
            else:
                reduced[pair] = verdict
        if reduced:
            judged = self._judge_fairly(list(dict.fromkeys(reduced.values())), deadline)
            for pair, expressions in reduced.items():
                known[pair] = judged[expressions]
                if known[pair].startswith(("right", "wrong", "gold_unparsable")):
                    self._remember(pair, known[pair])
        return known

    def close(self) -> None:
        self._processes.close()

    def _remembered(self, pair: Pair) -> str | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
        return self._cache.get(pair)

    def _remember(self, pair: Pair, verdict: str) -> None:
        self._cache[pair] = verdict
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _judge(self, pairs: Sequence[Pair], deadline: float, item_timeout: float) -> dict[Pair, str | Failed]:
        results: list[str | Failed] = self._processes.map(verify_pairs, pairs, deadline, item_timeout)
        return dict(zip(pairs, results, strict=True))

    def _judge_fairly(self, pairs: Sequence[Pair], deadline: float) -> dict[Pair, str]:
        """Judge pairs; an answer that hangs or kills its process is wrong if its gold answer works with another one."""
        judged = self._judge(pairs, deadline, self._item_timeout)
        failures = {pair: result for pair, result in judged.items() if isinstance(result, Failed)}
        doubtful = dict.fromkeys(gold for (_, gold), failed in failures.items() if failed.by_its_item)
        probes = self._judge([("0", gold) for gold in doubtful], deadline, self._item_timeout) if doubtful else {}
        fine = {gold for (_, gold), result in probes.items() if isinstance(result, str) and result != "gold_unparsable"}
        verdicts = {pair: result for pair, result in judged.items() if isinstance(result, str)}
        for pair, failed in failures.items():
            blamed = failed.by_its_item and pair[1] in fine
            verdicts[pair] = f"wrong: {failed.reason}" if blamed else failed.reason
        return verdicts


class MathReward(Reward):
    r"""Compares the response's final answer (`#### x`, `\boxed{x}`, `The answer is x`, `A: x`) with the gold answer.

    A response without an answer scores 0, and so does one whose answer takes too much work to evaluate. A response is
    invalid, with the reason, only if its gold answer is missing or unreadable, or if the processes did not reach it.
    """

    class Config(TextRuleConfig):
        format_weight: float = Field(default=0.0, ge=0)
        """Added to the value of a response that marks its final answer, whether right or wrong."""
        accept_last_number: bool = False
        """Use the last number of a response that marks no answer."""
        markers: Annotated[tuple[Marker, ...], Field(min_length=1)] = MARKERS
        """What may mark the final answer; the last one counts."""
        strip_units: bool = False
        """Also read bare letters as units if only one side has one: `12 m^2` equals 12. (Other units always are.)"""
        cache_size: int = Field(default=65536, ge=1)
        """Number of verdicts cached; the least recently used are dropped first."""

    _verifier: Verifier | None = None

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(answer=True, uses_gpu=False)

    @classmethod
    def doubts(cls, config: Any, prompts: Sequence[Prompt]) -> list[str]:
        """Warn about gold answers that are prose."""
        some = prompts[:: max(1, len(prompts) // LOOKED_AT)]
        golds = [(prompt, gold_final(prompt.answer).quantity) for prompt in some if prompt.answer is not None]
        prose = [(prompt, gold) for prompt, gold in golds if is_prose(gold)]
        if len(prose) < PROSE_SHARE * len(golds) or not prose:
            return []
        prompt, example = prose[0]
        shown = example if len(example) <= 80 else example[:77] + "..."
        return [
            f"{len(prose) / len(golds):.0%} of the gold answers are prose, for example {shown!r} (prompt {prompt.id}): "
            "the rule reward compares them word for word, so hardly any response is right. Name a column with short "
            "answers (data.answer_column), or choose a reward that understands prose (reward=judge, reward=polar)"
        ]

    @classmethod
    def vote(cls, config: Any, text: str) -> str | None:
        answer = final_answer(text, config.accept_last_number, config.markers)
        return None if answer is None else answer.quantity

    def start(self) -> None:
        self._open_verifier().start()

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        responses = [sample.text for group in groups for sample in group.samples]
        answers = [group.prompt.answer for group in groups for _ in group.samples]
        scores = iter(self.judge(responses, answers))
        return [GroupScores(tuple(next(scores) for _ in group.samples)) for group in groups]

    def judge(self, responses: Sequence[str], answers: Sequence[str | None]) -> list[Score]:
        """Return one score per (response, gold answer)."""
        finals = [final_answer(text, self.config.accept_last_number, self.config.markers) for text in responses]
        read = {answer: gold_final(answer).quantity for answer in set(answers) if answer is not None}
        golds = [None if answer is None else read[answer] for answer in answers]
        pairs = [
            (answer.quantity, gold)
            for answer, gold in zip(finals, golds, strict=True)
            if answer is not None and gold and len(answer.text) <= MAX_ANSWER_CHARACTERS
        ]
        # Keep a fifth of the call's deadline for everything else, so that the verifier gives up before it is killed.
        verdicts = self._open_verifier().verdicts(pairs, budget_seconds=0.8 * self.config.timeout_seconds)
        return [self._score(answer, gold, verdicts) for answer, gold in zip(finals, golds, strict=True)]

    def close(self) -> None:
        if self._verifier is not None:
            self._verifier.close()

    def _score(self, answer: FinalAnswer | None, gold: str | None, verdicts: dict[Pair, str]) -> Score:
        if not gold:
            return Score.invalid("no_gold: the prompt has no gold answer")
        if answer is None:
            return self._valid(False, False, "no final answer found")
        if len(answer.text) > MAX_ANSWER_CHARACTERS:
            return self._valid(False, answer.marked, f"the answer is longer than {MAX_ANSWER_CHARACTERS} characters")
        verdict = verdicts[answer.quantity, gold]
        trace = f"answer {answer.quantity!r} ({answer.marker}), gold {gold!r}: {verdict}"
        if verdict.startswith(("right", "wrong")):
            return self._valid(verdict == "right", answer.marked, trace)
        if verdict == "gold_unparsable":
            return Score.invalid(f"gold_unparsable: math-verify cannot read the gold answer {gold!r}", trace)
        return Score.invalid(verdict, trace)

    def _valid(self, correct: bool, marked: bool, trace: str) -> Score:
        value = float(correct) + self.config.format_weight * float(marked)
        return Score(value=value, components={"correct": float(correct), "format": float(marked)}, trace=trace)

    def _open_verifier(self) -> Verifier:
        if self._verifier is None:
            own = self.config
            self._verifier = Verifier(own.processes, own.item_timeout_seconds, own.cache_size, own.strip_units)
        return self._verifier
