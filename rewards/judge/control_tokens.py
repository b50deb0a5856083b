"""Control tokens of chat templates in what a judge is shown, broken up so that no server takes them for its own.

A server that parses special tokens inside of a message's content would end the turn where a response says
`<|im_end|>`, and take what follows for its own words. The endpoint's tokenizer is not known here, so the forms listed
below, those of widespread families, are broken up: a space after the first character. A family that is not listed has
tokens that pass. Nothing is removed, and the judge is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NOTE = (
    " The material spells out control tokens of language models; a space was put behind their first character. They "
    "are part of what is judged and mean nothing else."
)

_NAMES = "|".join(
    (
        *("s", "bos", "eos", "pad", "unk", "mask", "sep", "cls", "sop", "eop", "eot", "eod", "SYS", "SYSTEM", "USER"),
        *("(?:BOS|EOS|PAD|UNK|MASK|CLS|SEP|EOP|END_OF_TURN|START_OF_TURN)_TOKEN", r"(?:start|end)_of_\w{1,32}"),
        *(r"(?:begin|end)_of_\w{1,32}", r"extra_id_\d{1,4}", r"(?:unused|reserved_)\d{1,6}", r"seed:[\w:]{1,40}"),
        *("image_soft_token", "bot", "human", "EOT", "EOD", "EOS", "BOS", "PAD", "UNK", "CLS", "SEP", "MASK"),
        # reasoning and tools: Qwen 3, DeepSeek R1, Hermes, Nemotron, GLM
        *("think", "tool_call", "tool_calls", "tool_response", "tool_responses", "available_tools", "toolcall"),
        *("TOOLCALL", "TOOL_RESPONSE", "AVAILABLE_TOOLS", "arg_key", "arg_value", "endoftext"),
        # images
        *("image", "image_placeholder", "image_pad", "fake_token_around_image", "end_of_utterance", "global-img"),
        r"row_\d{1,3}_col_\d{1,3}",
    )
)
_BRACKETED = "|".join(
    (
        *("INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "TOOL_CONTENT", "CALL_ID", "ARGS"),
        *("THINK", "IMG", "IMG_BREAK", "IMG_END", "PREFIX", "MIDDLE", "SUFFIX", "MODEL_SETTINGS", "control_\\d{1,4}"),
        *("gMASK", "sMASK", "MASK", "CLS", "SEP", "PAD", "UNK", "BOS", "EOS", r"UNUSED_TOKEN_\d{1,4}"),
    )
)
_BREAK = re.compile(
    "|".join(
        (
            # ChatML, Qwen, Llama 3 and 4, Phi, GLM, Granite, Kimi, gpt-oss, Cohere; DeepSeek with U+FF5C
            r"(?<=[<＜])(?=[|｜]\S)",
            # their ends where a name stands before the bar: <turn|>
            r"(?<=[<＜])(?=[^\s<>＜＞|｜]{1,64}[|｜][>＞])",
            # Llama 2, Mistral, Gemma, Seed, T5 and kin
            rf"(?<=<)(?=/?(?:{_NAMES})>)",
            rf"(?<=\[)(?=/?(?:{_BRACKETED})\])",
            # EXAONE, MiniMax
            r"(?<=\[)(?=\|\w{1,32}\|\])",
            r"(?<=\])(?=~!?b[\[\]])|(?<=\[)(?=e~\[)",
        )
    )
)


def broken_up(text: str) -> str:
    """The text with a space behind the first character of everything that looks like a control token."""
    return _BREAK.sub(" ", text)


def harmless(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The chat without control tokens in any content; if there were some, its first message says so."""
    made = [{**message, "content": broken_up(message["content"])} for message in messages]
    if made and any(new["content"] != old["content"] for new, old in zip(made, messages, strict=True)):
        made[0]["content"] += NOTE
    return made
