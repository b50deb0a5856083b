"""Settings and fixtures that all tests share."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
from collections.abc import Generator
from pathlib import Path

import pytest
from paths import ROOT

# Before anything imports them: no network, and no more threads than the test machine has.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Until the tests are collected, whose time it would double: it goes through all objects of torch and vLLM each time.
gc.disable()

# A shell that runs the tests in the background starts them with Ctrl-C ignored, and their child processes would inherit
# that: tests that interrupt a run would then wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, each whole: two processes that share the files then end at about the same time."""
    long = {item.path for item in items if item.path.parent.name == "runs" or item.get_closest_marker("ray")}
    items.sort(key=lambda item: (item.path.parent.name != "runs", item.path not in long))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def repository() -> Path:
    """The checkout that the tests are in."""
    return ROOT


@pytest.fixture
def bare_model(tmp_path: Path) -> Path:
    """A folder that looks like a model to the configuration: config, tokenizer file, weights of 12,800 parameters."""
    folder = tmp_path / "bare_model"
    folder.mkdir()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "vocab_size": 100}
    config = {"model_type": "llama", "max_position_embeddings": 1024, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tensors = {"embed": {"dtype": "F32", "shape": [100, 128], "data_offsets": [0, 51200]}, "__metadata__": {}}
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(51200))
    return folder


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """The last line: what was not tested for lack of bubblewrap."""
    yield
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    untested = [reason for reason in reasons if "bubblewrap" in reason]
    if untested:
        terminalreporter.write_line(
            f"NOT TESTED: sandboxes of model-written code (reward=code), {len(untested)} tests: they need a working "
            "bubblewrap. Install it (apt-get install -y bubblewrap) and run the tests again.",
            red=True,
        )
