"""The stages that make the embedded agent, a policy that knows how the games are played and plays them badly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from examples.embedded_models.initial import save_untrained_policy, train_agent_tokenizer
from examples.embedded_models.play import GAMES, Game, Match, Writer, scripted
from examples.embedded_models.sampling import PLAIN, load_policy, sample_tokens
from examples.embedded_models.scale import Scale
from examples.embedded_models.stages import Measures, fine_tune
from examples.embedded_models.supervised import Example
from rlkit.data.rendering import ChatTemplate, load_tokenizer
from rlkit.environments.base import Task

MAX_TURN_TOKENS = 32
MATCHES_FOR_TOKENIZER = 256


def make_tokenizer(scale: Scale, seed: int, folder: Path) -> None:
    """Of the games' words and calls, and of all numbers of two digits."""
    plain = train_agent_tokenizer([])
    template, texts = ChatTemplate(plain), [f"{number:02d}" for number in range(100)]
    for game in GAMES:
        matches = asyncio.run(_matches(game, Writer(template, game), MATCHES_FOR_TOKENIZER, scale.sensible, seed))
        texts += [plain.decode([*match.prompt, *match.sample().token_ids]) for match in matches]
    train_agent_tokenizer(texts).save_pretrained(folder)


def make_agent(tokenizer: Path, scale: Scale, seed: int, folder: Path) -> Measures:
    """Trained from nothing on the turns of scripted players."""
    untrained = folder.with_name(folder.name + "_untrained")
    loaded = load_tokenizer(tokenizer)
    save_untrained_policy(untrained, loaded, seed)
    template = ChatTemplate(loaded)
    examples: list[Example] = []
    for game in GAMES:
        matches = asyncio.run(_matches(game, Writer(template, game), scale.agent_matches, scale.sensible, seed))
        examples += [_example(match) for match in matches]
    return fine_tune(untrained, scale.agent, _batches(examples, scale.agent.batch, seed), "agent", folder)


def measure_agent(folder: Path, scale: Scale, seed: int) -> Measures:
    """Of held-out tasks: the share that ends well, and turns, of the agent at temperature 1."""
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
    """All tasks side by side, a turn at a time."""
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


async def _matches(game: Game, writer: Writer, count: int, sensible: float, seed: int) -> list[Match]:
    """Of scripted players, on tasks to train on."""
    rng = random.Random(f"{game.name}/{seed}")
    tasks = game.tasks("train", train_tasks=count)
    return [await scripted(game, rng.choice(tasks), writer, sensible, rng) for _ in range(count)]


def _example(match: Match) -> Example:
    sample = match.sample()
    return Example(tuple(match.prompt), tuple(sample.token_ids.tolist()), tuple(sample.trained.tolist()))


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    rng = random.Random(f"agent/{seed}")
    while True:
        yield rng.sample(examples, size)
