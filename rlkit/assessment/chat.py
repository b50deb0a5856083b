"""A conversation with a checkpoint in the terminal, through transformers: a single sequence gains nothing from vLLM,
whose engine needs seconds and memory to start. The template and end tokens are those of training."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from rlkit.assessment.subject import find_subject
from rlkit.config.messages import ConfigError, ConfigIssue, all_fields, validate
from rlkit.experience import Message
from rlkit.experience.section import Section, Seed
from rlkit.models.folder import ModelFolderError, check_model_folder, model_folder

HELP = """\
/reset          forget the conversation
/system TEXT    start again with this system prompt (without TEXT: none)
/set KEY=VALUE  temperature, top_p, top_k, repetition_penalty, max_tokens or seed
/prompt         show what the model reads, as the template renders it
/help           show this list
/quit           quit (or Ctrl-D); Ctrl-C stops an answer"""


class ChatConfig(Section):
    """`rlkit chat CHECKPOINT [key=value ...]`."""

    system: str = ""
    """System prompt; empty: none."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature; 0: always the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: keep only the likeliest tokens with this total probability."""
    top_k: int = Field(default=0, ge=0)
    """Keep only the k likeliest tokens; 0 keeps all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divisor for the logits of tokens that have already occurred."""
    max_tokens: int = Field(default=512, ge=1)
    """Answers are cut off at this length."""
    seed: Seed | None = None
    """Null: a different answer each time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own."""
    trust_remote_code: bool = False
    """Run Python code from the model folder. Only for folders you trust."""


CHANGEABLE = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")


def read_options(words: Sequence[str], base: ChatConfig | None = None) -> ChatConfig:
    """Parse `KEY=VALUE` words, on top of `base`. Raises ConfigError."""
    typed: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError([ConfigIssue(word, f"is not an option; write {word}=VALUE")])
        typed[key] = value
    values = {key: text if key == "system" else _value(text) for key, text in typed.items()}
    known = [key for key, _ in all_fields(ChatConfig)]
    tree = {**({} if base is None else base.model_dump()), **values}

    def where(key: str, value: Any) -> str:
        return f"{key}={typed.get(key, value)}"

    config, problems = validate(ChatConfig, tree, "", known, where, {})
    if not isinstance(config, ChatConfig):
        raise ConfigError(problems)
    return config


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def policy_folder(named: str) -> Path:
    """Return the policy's folder for a run (its newest checkpoint), a checkpoint or a model. Raises ConfigError."""
    model = find_subject(named).model
    if not model:
        raise ConfigError([ConfigIssue(named, "is a run that has saved no checkpoint (trainer.save_every_steps)")])
    try:
        check_model_folder(model)
    except ModelFolderError as error:
        raise ConfigError([ConfigIssue(named, str(error))]) from error
    return model_folder(model)


@dataclass
class Chat:
    """A conversation with a loaded model."""

    folder: Path
    config: ChatConfig
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from rlkit.data.rendering import ChatTemplate, load_tokenizer
        from rlkit.rollout.engine import stop_token_ids

        logging.disable_progress_bar()
        config = self.config
        on_gpu = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        dtype = ("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype
        self.tokenizer = load_tokenizer(self.folder, config.trust_remote_code)
        self.template = ChatTemplate(self.tokenizer, config.chat_template)
        self.stops = stop_token_ids(str(self.folder), self.tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            str(self.folder), dtype=getattr(torch, dtype), trust_remote_code=config.trust_remote_code
        )
        self.model = model.to("cuda" if on_gpu else "cpu").eval()
        self.reset(config.system)

    def reset(self, system: str) -> None:
        self.messages = [Message("system", system)] if system else []

    def prompt(self) -> str:
        """Return the text that the model reads. Raises ConfigError if the template refuses the conversation."""
        (text,) = self.template.texts([self.messages], ask=True)
        if not isinstance(text, str):
            raise ConfigError([ConfigIssue("the chat template", text.reason)])
        return text

    def answer(self, question: str, stop: threading.Event) -> Iterator[str]:
        """Yield pieces of the answer as they come, and then add the answer to the conversation; `stop` ends it."""
        import torch
        from transformers import StoppingCriteria, TextIteratorStreamer

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        self.messages.append(Message("user", question))
        try:
            ids = torch.tensor(self.template.token_ids([self.prompt()]), device=self.model.device)
        except ConfigError:
            self.messages.pop()
            raise
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed + len(self.messages))
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    stopping_criteria=[Stopped()],
                    eos_token_id=self.stops,
                    pad_token_id=self.stops[0],
                    **sampling(self.config),
                )
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, name="chat", daemon=True)
        thread.start()
        said = []
        for piece in streamer:
            said.append(piece)
            yield piece
        thread.join()
        if failed:
            self.messages.pop()
            raise failed[0]
        self.messages.append(Message("assistant", "".join(said)))


def sampling(config: ChatConfig) -> Mapping[str, Any]:
    """Return the options for transformers' `generate`."""
    options: dict[str, Any] = {
        "max_new_tokens": config.max_tokens,
        "do_sample": config.temperature > 0,
        "repetition_penalty": config.repetition_penalty,
    }
    if config.temperature > 0:
        options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return options


def talk(chat: Chat) -> None:
    """Read and answer lines until the end of the input."""
    terminal = sys.stdin.isatty()
    print(f"{chat.folder}  (/help lists the commands)")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                print(_obeyed(chat, line))
            else:
                _speak(chat, line)
        except ConfigError as error:
            print("; ".join(map(str, error.problems)))


def _speak(chat: Chat, line: str) -> None:
    stop = threading.Event()
    # An exception would end the generator and lose what it has produced.
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        for piece in chat.answer(line, stop):
            print(shown(piece), end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print()


def shown(text: str) -> str:
    """Replace control characters, because a model's output must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def _obeyed(chat: Chat, line: str) -> str:
    word, _, rest = line.partition(" ")
    if word == "/reset":
        chat.reset(chat.messages[0].content if chat.messages and chat.messages[0].role == "system" else "")
        return "the conversation is forgotten"
    if word == "/system":
        chat.reset(rest.strip())
        return "a new conversation" + (" with this system prompt" if rest.strip() else " without a system prompt")
    if word == "/set":
        key = rest.partition("=")[0].strip()
        if key not in CHANGEABLE:
            return f"{key or 'that'} cannot be changed; these can: {', '.join(CHANGEABLE)}"
        chat.config = read_options([rest.strip().replace(" ", "")], chat.config)
        return rest.strip()
    return shown(chat.prompt()) if word == "/prompt" else HELP
