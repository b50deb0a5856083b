"""Groups with other prompts, for passes that measure how likely responses are after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from algorithms.base import Render
from rlkit.experience import Group, Message, UserError


def mismatched(groups: Sequence[Group]) -> list[Group]:
    """Pair each prompt's first response with the next prompt; their mean score is KTO's baseline.

    Raise UserError for fewer than two prompts.
    """
    by_prompt = list({group.prompt.token_ids: group for group in groups}.values())
    if len(by_prompt) < 2:
        raise UserError(
            "KTO's baseline pairs responses with other prompts, but this step has one prompt; set "
            "trainer.prompts_per_step=2 or more (or link=bco)"
        )
    following = [*by_prompt[1:], by_prompt[0]]
    return [
        Group(group.id, after.prompt, group.samples[:1], step=group.step)
        for group, after in zip(by_prompt, following, strict=True)
    ]


def with_wish(group: Group, wish: str, render: Render) -> Group:
    """The same responses, after a prompt that ends with `wish`."""
    *before, last = group.prompt.messages
    messages = (*before, Message(last.role, f"{last.content}\n\n{wish}"))
    return replace(group, prompt=replace(group.prompt, messages=messages, token_ids=render(messages)))
