"""Checks a preference model's folder by its config.json, and encodes its inputs. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlkit.experience import Message, UserError
from rlkit.experience.texts import encodable

LONGEST_INPUT = 32768
"""In tokens, if neither the model nor its tokenizer states a limit."""


class ClassifierError(UserError, ValueError): ...


def check_classifier(folder: Path) -> dict[str, Any]:
    """Return config.json. Raise ClassifierError unless it is a one-label sequence classifier."""
    path = folder / "config.json"
    if not path.is_file():
        raise ClassifierError(f"reward.model_path: {folder} holds no config.json; name a Hugging Face model folder")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClassifierError(f"reward.model_path: {path} is not JSON: {error}") from error
    (architecture, *_) = config.get("architectures") or ["(none)"]
    if not architecture.endswith("ForSequenceClassification"):
        raise ClassifierError(
            f"reward.model_path: {folder} holds a {architecture}; a preference reward is a "
            "`...ForSequenceClassification` with one label and a trained head (python -m rlkit.train_reward "
            "reward=preference makes one of a causal language model)"
        )
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise ClassifierError(f"reward.model_path: {folder} has {labels} labels; a preference reward has one")
    return config


def positions(config: dict[str, Any]) -> int:
    """Return the longest input in tokens."""
    text = config.get("text_config", config)
    return int(text.get("max_position_embeddings") or LONGEST_INPUT)


Layout = Literal["chat", "pair"]

_PROBE = "Tom  has 3 apples,\n and 12.5% of £7?"


class Unreadable(ValueError):
    """An input cannot be scored; the message is the reason (`class: details`)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    """Segment ids, for models that have them (BERT); else empty."""


class Encoder:
    """Tokenises conversations with the model's chat template, or as a pair of texts.

    Special tokens spelled out in a response (a forged end of turn, a second user) are removed. The prompt is unchanged.
    """

    def __init__(self, folder: Path, layout: Layout, chat_template: str | None, max_length: int) -> None:
        """Load the folder's tokenizer; raise ClassifierError if that fails or it has no template."""
        from transformers import AutoTokenizer

        try:
            # Without a limit there is no warning; lengths are checked here.
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ClassifierError(f"reward.model_path: the tokenizer of {folder} does not load: {reason}") from error
        self.max_length = min(max_length, int(self.tokenizer.model_max_length), LONGEST_INPUT)
        self._layout = layout
        self.template: str | None = None
        """Replaces the tokenizer's own template."""
        if chat_template is not None:
            try:
                self.template = Path(chat_template).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ClassifierError(f"reward.chat_template={chat_template} cannot be read: {error}") from error
        if layout == "chat" and not (self.template or self.tokenizer.chat_template):
            raise ClassifierError(
                f"reward.model_path: the tokenizer of {folder} has no chat template; name a Jinja file with "
                "reward.chat_template, or use reward.layout=pair if the model reads (prompt, response)"
            )
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        # Llama 3's end-of-turn token is special but is not one of the named special tokens.
        self._special = sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        _check_saved_tokenizer(self.tokenizer, folder)
        self._check_one_bos()

    def encode(self, messages: Sequence[Message], response: str) -> Encoded:
        """Encode one input; raise Unreadable if the template refuses it or it exceeds `max_length`."""
        encoded = self._encode(messages, without(encodable(response), self._special))
        if len(encoded.ids) > self.max_length:
            raise Unreadable(f"too_long: {len(encoded.ids)} tokens, more than the preference model's {self.max_length}")
        if not encoded.ids:
            raise Unreadable("empty: prompt and response have no tokens")
        return encoded

    def _encode(self, messages: Sequence[Message], response: str) -> Encoded:
        if self._layout == "pair":
            prompt = encodable("\n".join(message.content for message in messages))
            pair = self.tokenizer(prompt, response, truncation=False, verbose=False)
            return Encoded(tuple(pair["input_ids"]), tuple(pair.get("token_type_ids", ())))
        from jinja2 import TemplateError

        chat = [{"role": message.role, "content": encodable(message.content)} for message in messages]
        chat.append({"role": "assistant", "content": response})
        try:
            text = self.tokenizer.apply_chat_template(chat, chat_template=self.template, tokenize=False)
        except TemplateError as error:
            raise Unreadable(f"template: the chat template refuses this conversation: {error}") from error
        return Encoded(tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))

    def _check_one_bos(self) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and self._encode([Message("user", "Hi")], "Hi").ids[:2] == (bos, bos):
            raise ClassifierError("the preference model's chat template begins with the BOS token twice: remove one")


def until_read(ids: tuple[int, ...], pad_id: int | None) -> tuple[int, ...]:
    """Cut after the last token that is not padding, because transformers reads the score there."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]


def without(text: str, forbidden: Sequence[str]) -> str:
    """Remove these strings, and any of them that the removal creates."""
    before = None
    while before != text:
        before = text
        for token in forbidden:
            text = text.replace(token, "")
    return text


def _check_saved_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Check that transformers did not replace the saved tokenizer by the model type's, which can lose white space."""
    saved = folder / "tokenizer.json"
    if not saved.is_file():
        return
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(saved)).encode(_PROBE, add_special_tokens=False).ids
    if tokenizer.encode(_PROBE, add_special_tokens=False) != expected:
        raise ClassifierError(
            f"{folder}: transformers chose {type(tokenizer).__name__} for this model_type; it splits text differently "
            "from the saved tokenizer.json, which the model was trained with: change model_type in config.json"
        )
