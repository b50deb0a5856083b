"""Options of `rlkit chat`, where its model is found, Ctrl-C, and that an answer cannot steer the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rlkit.assessment.chat import Chat, policy_folder, read_options, sampling, shown, talk
from rlkit.config.messages import ConfigError


def test_options_are_typed_and_a_wrong_one_is_named() -> None:
    config = read_options(["temperature=0", "system=Be brief: yes", "max_tokens=7"])
    assert (config.temperature, config.system, config.max_tokens) == (0, "Be brief: yes", 7)
    assert sampling(config) == {"max_new_tokens": 7, "do_sample": False, "repetition_penalty": 1.0}
    assert read_options(["top_k=3"], config).max_tokens == 7
    for word, said in [
        ("temprature=1", "did you mean temperature?"),
        ("top_p=7", "at most 1"),
        ("fast", "write fast="),
    ]:
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            read_options([word])


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path, bare_model: Path) -> None:
    for step in (4, 20):
        folder = tmp_path / f"run/checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "policy").symlink_to(bare_model)
    newest = tmp_path / "run/checkpoints/step_000020/policy"
    assert policy_folder(str(tmp_path / "run")) == newest
    assert policy_folder(str(newest.parent)) == newest
    assert policy_folder("embedded:policy").name == "policy"
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "unsaved/samples.jsonl").touch()
    with pytest.raises(ConfigError, match="has saved no checkpoint"):
        policy_folder(str(tmp_path / "unsaved"))
    with pytest.raises(ConfigError, match="no such folder"):
        policy_folder(str(tmp_path / "nothing"))


def test_control_characters_are_not_printed() -> None:
    assert shown("a\n\tb\x1b[2J\x07") == "a\n\tb�[2J�"


def test_ctrl_c_ends_an_answer_which_stays_in_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(policy_folder("embedded:policy"), read_options(["temperature=2", "max_tokens=900", "seed=1"]))
    chat.stops = [0]  # never sampled: without Ctrl-C it says more than 800 tokens
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 plus 3?\n"))
    screen = io.StringIO()

    def interrupt() -> None:
        while screen.getvalue().count("\n") < 2:  # the first is the greeting's
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with contextlib.redirect_stdout(screen):
        talk(chat)
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    said = chat.messages[1].content
    assert screen.getvalue().endswith(f"\n{said}\n") and 0 < len(chat.tokenizer(said).input_ids) < 400
    assert "chat" not in [thread.name for thread in threading.enumerate()]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
