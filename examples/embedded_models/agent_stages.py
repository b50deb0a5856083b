"""The stages that make the embedded agent, a policy that knows how to play the games but plays them badly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from examples.embedded_models.initial import save_untrained_policy, train_agent_tokenizer
from examples.embedded_models.play import GAMES, Game, Match, Writer, scripted
from examples.embedded_models.sampling import PLAIN, load_policy, sample_tokens
from examples.embedded_models.scale import Scale, Training
from examples.embedded_models.stages import Measures, fine_tune
from examples.embedded_models.supervised import Example
from rlkit.data.rendering import ChatTemplate, load_tokenizer
from rlkit.environments.base import Task
from rlkit.environments.games.hidden_facts import ANIMALS, COLOURS
from rlkit.environments.games.maze import MOVES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TURN_TOKENS = 32
MATCHES_FOR_TOKENIZER = 64
SENSIBLE, CARELESS = 0.9, 0.55
"""Share of sensible moves of the players that the base learns from, and of those that the agent imitates."""


def make_tokenizer(seed: int, folder: Path) -> None:
    """Make a tokenizer of the games' words and calls and of all two-digit numbers; each becomes one token."""
    plain = train_agent_tokenizer([])
    texts = [*(f"{number:02d}" for number in range(100)), *ANIMALS, *COLOURS, *MOVES] * 3
    for game in GAMES:
        matches = asyncio.run(_matches(game, plain, MATCHES_FOR_TOKENIZER, CARELESS, seed))
        texts += [plain.decode([*match.prompt, *match.sample().token_ids]) for match in matches]
    train_agent_tokenizer(texts).save_pretrained(folder)


def make_base(tokenizer: Path, scale: Scale, seed: int, folder: Path) -> Measures:
    """Train the base from scratch on players who know how to play the games."""
    untrained = folder.with_name(folder.name + "_untrained")
    save_untrained_policy(untrained, load_tokenizer(tokenizer), seed)
    return _imitate(untrained, scale.agent_base, scale.matches, SENSIBLE, seed, "agent's base", folder)


def make_agent(base: Path, scale: Scale, seed: int, folder: Path) -> Measures:
    """Train the agent to imitate careless players, so that it knows more than it shows."""
    return _imitate(base, scale.agent, scale.matches, CARELESS, seed + 1, "agent", folder)


def measure_agent(folder: Path, scale: Scale, seed: int) -> Measures:
    """Measure the agent at temperature 1 on held-out tasks: success rate and mean number of turns."""
    measures: Measures = {"matches": scale.judged_matches}
    for game in GAMES:
        tasks = game.tasks("heldout")
        chosen = [tasks[i % len(tasks)] for i in range(scale.judged_matches)]
        matches = asyncio.run(played(folder, game, chosen, seed))
        measures[game.name] = {
            "success": sum(match.success for match in matches) / len(matches),
            "turns": sum(match.turns for match in matches) / len(matches),
        }
    return measures


async def played(folder: Path, game: Game, tasks: Sequence[Task], seed: int) -> list[Match]:
    """Play all tasks concurrently, one turn at a time."""
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    writer = Writer(ChatTemplate(tokenizer), game)
    torch.manual_seed(seed)
    matches = [Match(game, task, writer) for task in tasks]
    for match in matches:
        await match.begin()
    while going := [match for match in matches if not match.done]:
        prompts = [match.conversation.prompt() for match in going]
        turns = sample_tokens(model, tokenizer, prompts, 1, PLAIN, MAX_TURN_TOKENS)
        for match, (ids,) in zip(going, turns, strict=True):
            await match.turn(ids, cut=ids[-1:] != [tokenizer.eos_token_id])
    return matches


def _imitate(
    start: Path, training: Training, count: int, sensible: float, seed: int, what: str, folder: Path
) -> Measures:
    tokenizer = load_tokenizer(start)
    matches = [match for game in GAMES for match in asyncio.run(_matches(game, tokenizer, count, sensible, seed))]
    batches = _batches([_example(match) for match in matches], training.batch, seed)
    return fine_tune(start, training, batches, what, folder)


async def _matches(
    game: Game, tokenizer: PreTrainedTokenizerBase, count: int, sensible: float, seed: int
) -> list[Match]:
    """Play matches of scripted players on training tasks."""
    rng, writer = random.Random(f"{game.name}/{seed}"), Writer(ChatTemplate(tokenizer), game)
    tasks = game.tasks("train", train_tasks=count)
    return [await scripted(game, rng.choice(tasks), writer, sensible, rng) for _ in range(count)]


def _example(match: Match) -> Example:
    sample = match.sample()
    return Example(tuple(match.prompt), tuple(sample.token_ids.tolist()), tuple(sample.trained.tolist()))


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(f"agent/{seed}")
    while True:
        yield rng.sample(examples, size)
