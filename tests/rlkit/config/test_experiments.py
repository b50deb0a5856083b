"""Every recipe of conf/experiment is a valid run on the hardware its head names, and stands in docs/recipes.md.

Models are folders of the right shape without weights, data a few rows with the right columns.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from benchmarks.memory import SHAPES, Model, write_model
from rlkit import train, train_reward
from rlkit.config.loading import load_config
from rlkit.config.parts import ResolvedRun

FOLDERS = {"train": ROOT / "conf" / "experiment", "train_reward": ROOT / "conf" / "train_reward" / "experiment"}
RECIPES = sorted(file.stem for file in FOLDERS["train"].glob("*.yaml") if file.stem != "gsm8k")
REWARDS = sorted(file.stem for file in FOLDERS["train_reward"].glob("*.yaml"))
HEAD = ("Source", "Hardware", "Hours", "Published", "Ours")

LLAMA = Model("llama", 4096, 32, 14336, 32, 8, 128256, False)
OLMO = Model("llama", 4096, 32, 11008, 32, 32, 100278, False)
MODELS = {
    "Qwen/Qwen2.5-0.5B": SHAPES["0.5B"],
    "Qwen/Qwen2.5-0.5B-Instruct": SHAPES["0.5B"],
    "Qwen/Qwen2.5-1.5B-Instruct": SHAPES["1.5B"],
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": SHAPES["1.5B"],
    "Qwen/Qwen2.5-3B-Instruct": SHAPES["3B"],
    "Qwen/Qwen2.5-7B": SHAPES["7B"],
    "Qwen/Qwen2.5-7B-Instruct": SHAPES["7B"],
    "Qwen/Qwen2.5-Math-7B": SHAPES["7B"],
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": SHAPES["7B"],
    "PRIME-RL/Eurus-2-7B-SFT": SHAPES["7B"],
    "Qwen/Qwen2.5-32B": SHAPES["32B"],
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA,
    "allenai/Llama-3.1-Tulu-3-8B-DPO": LLAMA,
    "allenai/Llama-3.1-Tulu-3-8B-RM": LLAMA,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": LLAMA,
    "allenai/Olmo-3-1025-7B": OLMO,
    "internlm/POLAR-7B-llama": SHAPES["7B"],
}
"""The recipes' models by their folders."""
MATH = {"question": "What is {n} + 1?", "problem": "What is {n} + 1?", "answer": "{n}"}
CHAT = {"prompt": [{"role": "user", "content": "What is {n} + 1?"}], "reward_model": {"ground_truth": "{n}"}}
CODE = {**MATH, "prompt": "What is {n} + 1?", "tests": {"inputs": ["1"], "outputs": ["2"]}}
RLVR = {
    "messages": CHAT["prompt"],
    "answer": "{n}",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
ROWS: dict[str, dict[str, Any]] = {
    "dapo_qwen32b": CHAT,
    "dapo_qwen7b_math": CHAT,
    "eurus_prime": CODE,
    "skywork_or1_7b": CODE,
    "polar_rft_qwen7b": {"prompt": "What is {n} + 1?", "reference": "It is more than {n}."},
    "polar_rft_llama8b": {"prompt": "What is {n} + 1?", "reference": "It is more than {n}."},
    "tulu3_8b_rlvr": RLVR,
    "tulu31_8b_grpo": RLVR,
    "olmo3_rlzero_math": {"prompt": "What is {n} + 1?", "ground_truth": "{n}"},
    "implicit_prm_8b": {"prompt": "What is {n} + 1?", "completions": ["a", "b"], "correctness": [True, False]},
    "tulu3_rm": {name: [*CHAT["prompt"], {"role": "assistant", "content": name}] for name in ("chosen", "rejected")},
}
"""A row of each recipe's data; the others have MATH's columns."""


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    """Where a Ray cluster might listen: whether there is one on this machine is another matter."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model, and the data of every recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, size in MODELS.items():
        write_model(size, folder / name, random=False)
    polar = folder / "internlm/POLAR-7B-llama/config.json"
    config = json.loads(polar.read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    polar.write_text(json.dumps(config))
    for name in (*RECIPES, *REWARDS):
        row = json.dumps(ROWS.get(name, MATH))
        lines = [row.replace("{n}", str(n)) for n in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def head(folder: Path, name: str) -> dict[str, str]:
    """`# Key: value` of the comment at the beginning, continued on lines without a key."""
    lines = (folder / f"{name}.yaml").read_text().split("\ndefaults:")[0].splitlines()
    found: dict[str, str] = {}
    key = None
    for line in lines:
        match = re.fullmatch(r"# ([A-Z][a-z]+): (.*)", line)
        if match:
            key, found[match[1]] = match[1], match[2]
        elif key is not None:
            found[key] += " " + line.removeprefix("#").strip()
    return found


def gpus_named(name: str) -> tuple[int, int]:
    """How many in the head, and of how many GB."""
    named = re.search(r"here (\d+) x (\d+) GB", head(FOLDERS["train"], name)["Hardware"])
    assert named is not None
    return int(named[1]), int(named[2])


def words(name: str, content: dict[str, Any], ray: str) -> list[str]:
    """What a user with a copy of the data, a cluster, and a sandbox elsewhere types besides."""
    typed = [f"experiment={name}", f"data.path={name}.jsonl"]
    hub = {"subset", "split", "heldout_split"} & set(content.get("data", {}))
    typed += [f"data.{key}=null" for key in sorted(hub)]
    text = json.dumps(content)
    if "multi_node" in text:
        typed.append(f"cluster.address={ray}")
    if "isolation" in text:  # a dry run would try the sandbox
        part = "reward.outcome.parts.code" if "outcome" in content["reward"] else "reward.parts.code"
        typed += [f"{part}.isolation=http", f"{part}.url=http://127.0.0.1:9"]
    return typed


def content_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text())
    return content


@pytest.fixture
def dry_run(
    home: Path, ray: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[..., int], str, Path], str]:
    def run(command: Callable[..., int], name: str, folder: Path) -> str:
        monkeypatch.chdir(home)
        typed = words(name, content_of(folder, name), ray)
        if command is train.main:
            _, gigabytes = gpus_named(name)
            typed += [f"cluster.gpu_memory_gib={gigabytes - 2}", "cluster.host_memory_gib=1800"]
        code = command([*typed, f"run_dir={home / 'runs' / name}", "dry_run=true"])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out + said.err

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_a_dry_run_on_its_hardware(
    name: str, dry_run: Callable[[Callable[..., int], str, Path], str]
) -> None:
    text = dry_run(train.main, name, FOLDERS["train"])
    assert "The configuration is valid" in text
    assert "warning" not in text, text
    shared = re.search(r"^ +GPUs +(\d+)", text, flags=re.MULTILINE)
    apart = [
        re.search(rf" (\d+) {kind}", text) for kind in ("vLLM engines?", "DeepSpeed ranks?", "worker of ImplicitPRM")
    ]
    gpus = int(shared[1]) if shared else sum(int(match[1]) for match in apart if match)
    assert gpus == gpus_named(name)[0]


@pytest.mark.parametrize("name", REWARDS)
def test_a_recipe_of_a_reward_model_passes_a_dry_run(
    name: str, dry_run: Callable[[Callable[..., int], str, Path], str]
) -> None:
    assert "The configuration is valid" in dry_run(train_reward.main, name, FOLDERS["train_reward"])


@pytest.mark.parametrize(
    ("kind", "name"), [*(("train", name) for name in RECIPES), *(("train_reward", name) for name in REWARDS)]
)
def test_a_recipe_names_its_source_and_figures_and_the_page_repeats_them(kind: str, name: str) -> None:
    about = head(FOLDERS[kind], name)
    assert not set(HEAD) - set(about)
    assert about["Ours"] == "not run"
    page = (ROOT / "docs" / "recipes.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[-2:] == [about["Published"], about["Ours"]]


@pytest.fixture
def loaded(home: Path, ray: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ResolvedRun]:
    monkeypatch.chdir(home)

    def load(name: str) -> ResolvedRun:
        typed = words(name, content_of(FOLDERS["train"], name), ray)
        memory = ["cluster.gpu_memory_gib=139", "cluster.host_memory_gib=1800"]
        return load_config([*typed, *memory, f"run_dir={home / 'runs' / name}", "dry_run=true"])

    return load


def test_worked_numbers_of_the_recipes(loaded: Callable[[str], Any]) -> None:
    """What the sources say in their own units."""

    dapo = loaded("dapo_qwen7b_math")
    longest, share = dapo.algorithm_config.overlong_max_tokens, dapo.algorithm_config.overlong_buffer_share
    assert (longest, longest * share) == (8192, 4096)
    assert dapo.config.trainer.prompts_per_step // dapo.config.learner.minibatches_per_step == 32
    assert dapo.config.learner.warmup_steps == 10 * dapo.config.learner.minibatches_per_step
    big = loaded("dapo_qwen32b").algorithm_config
    assert big.overlong_max_tokens * big.overlong_buffer_share == 4096
    oat = loaded("dr_grpo_math7b")
    assert 128 * oat.algorithm_config.samples_per_prompt // oat.config.learner.minibatches_per_step == 128
    assert oat.algorithm_config.constant_length == 3000
    open_r1 = loaded("openr1_qwen15b").config
    prompts = 7 * 16 * 4 // open_r1.algorithm["samples_per_prompt"]  # processes x responses x accumulation
    assert (open_r1.trainer.prompts_per_step, open_r1.learner.warmup_steps) == (prompts, round(93_733 / prompts / 10))
    olmo = loaded("olmo3_rlzero_math").config
    assert olmo.trainer.total_steps * olmo.trainer.prompts_per_step * 8 == 768_000
    tulu = loaded("tulu31_8b_grpo").config
    assert tulu.trainer.total_steps * tulu.trainer.prompts_per_step * 16 == pytest.approx(2_000_000, rel=1e-3)
    orz = loaded("orz_7b_ppo").config
    assert (orz.learner.minibatches_per_step, orz.critic.minibatches_per_step) == (1, 16)
