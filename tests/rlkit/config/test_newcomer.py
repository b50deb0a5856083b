"""What new users typed that was wrong: what they read, and that nothing starts (exit code 2).

The cases are the rows of the tables of a newcomer's study: messages that misled, and values that were accepted.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from rlkit.models.folder import model_folder

Typed = Callable[..., str]


MISLEADING = {
    "algorithm.eps_clip=-1": ["algorithm.clip_low and algorithm.clip_high"],
    "reward=null": ["a run needs one", "rule"],
    "rewards=rule": ["did you mean reward?"],
    "reward=rule.yaml": ["reward=rule"],
    "learner.betas=[0.9]": ["learner.betas=[0.9]: must be a list of 2", "like [0.9,0.999]"],
    "reward=function reward.function=my_rewards.py": ["names a file", "my_rewards.exact"],
    "reward=function reward.function=my_rewards.exakt": ["did you mean my_rewards.exact?"],
    "resume=true": ["did you mean resume=auto?"],
    "resume=latest": ["did you mean resume=auto?"],
    "resume=false": ["did you mean resume=never?"],
    "resume=auto": ["add run_dir=FOLDER"],
    "--config": ["--config: needs a file"],
    "--config trainer.total_steps=3": ["--config: needs a file"],
    "--config things": ["--config things: is a folder; name a file in it"],
    "--config old": ["did you mean old/config.yaml?"],
    "config=old.yaml": ["--config FILE"],
    "--dry-run": ["did you mean dry_run=true?"],
    "--dry_run=true": ["did you mean dry_run=true?"],
    "--verison": ["did you mean --version?"],
    "--hlep": ["did you mean --help?"],
    "help": ["did you mean --help?"],
    "version": ["did you mean --version?"],
    "reward=code": ["reward.isolation: needs a value, one of bubblewrap, http; write reward.isolation=bubblewrap"],
    "algorithm=dapo trainer.prompts_per_step=8": ["learner.minibatches_per_step=16 (set by algorithm=dapo)"],
    "--multirun": ["there are no sweeps"],
    "-m": ["there are no sweeps"],
    "--cfg=job": ["dry_run=true prints the plan"],
    "trainer.total_steps:␣3": ["write trainer.total_steps=3"],
    "rollout.temperature=0": ["must be above 0", "all responses to a prompt are the same", "evaluation.greedy=true"],
    "algorithm=dapo algorithm.gae_lambda=.9": ["it belongs to algorithm=ppo"],
    "algorithm.gama=1": ["did you mean algorithm.gamma?", "it belongs to algorithm=", "algorithm=ppo"],
    "algorithm.nothing=1": ["--help algorithm lists the keys"],
    "model.lora_rank=8": ["model.lora.rank=16 trains a low-rank adapter"],
    "model.lora.dropout=0.1": ["dropout is never active"],
    "model.qlora=true": ["the base is not quantised"],
    "peft=lora": ["model.lora.rank=16 trains a low-rank adapter"],
    "tracking.wandb=true": ["W&B is a tracker", "tracking.trackers=[tensorboard,wandb]"],
    "tracking=wandb": ["W&B is a tracker", "available: default"],
    "tracking=mlflow": ["mlflow is a tracker: tracking.trackers=[tensorboard,mlflow]"],
    "tracking=comet": ["needs a class of your own"],
    "trainer.logger=wandb": ["trackers are a list", "tracking.trackers=[tensorboard,wandb]"],
    "rollout.name=hf": ["the sampler is vLLM"],
    "reward=[rule,length] reward.parts.length.weight=0": ["reward.parts.length: set reward.parts.length.max_tokens"],
    "algorithm=online_dpo": ["algorithm=dpo"],
    "algorithm=nope": ["1 problem", "algorithm=nope: no such option; available: amft"],
    "algorithm=purre": ["1 problem", "did you mean pure?"],
    "verifier=none": ["held-out answers are always judged", "evaluation.training_answers=false"],
    "model=Qwen/Qwen3-0.6B": ["model=hf model.path=FOLDER"],
    "rollout.multi_turn=true": ["several turns and tools need an environment: environment=NAME"],
    "rollout.tools=[search]": ["several turns and tools need an environment: environment=NAME"],
    "env=gym": ["several turns and tools need an environment: environment=NAME"],
    "model.enable_thinking=false": ["model.chat_template_arguments.NAME=VALUE"],
    "data.chat_template_kwargs.enable_thinking=false": ["model.chat_template_arguments.NAME=VALUE"],
    "model.chat_template_arguments.enable_thinking=false": [
        "enable_thinking=false: is not a variable of the chat template; it has"
    ],
    "model.chat_template_arguments.messages=1": ["is set for every prompt already"],
    "rollout.stop_strings=[x]": ["did you mean rollout.stop?"],
    "rollout.eos_token_id=3": ["a text or token of rollout.stop"],
    "rollout.stop=[true]": ["must be a list (an integer or text each)"],
    "rollout.stop=['']": ["rollout.stop=['']: has an empty text"],
    "rollout.stop=[x,99999]": ["token 99999 is not in the model's vocabulary of 486"],
    "rollout.stop=-1": ["token -1 is not in the model's vocabulary"],
    "rollout.min_p=1": ["must be a number, at least 0 and below 1"],
    "rollout.repetition_penalty=0": ["must be a number, above 0"],
    "rollout.guided_regex=x": ["did you mean rollout.structured.regex?"],
    "rollout.structured=x": ["rollout.structured=x"],
    "rollout.structured.regex=x rollout.structured.choices=[y]": ["set one of regex, choices and json_schema"],
    "rollout.structured.regexp=x": ["did you mean rollout.structured.regex?"],
    "rollout.structured.regex=a**": ["rollout.structured.regex", "is not a regular expression: multiple repeat"],
    "rollout.structured.choices=yes": ["choices must be a list of texts, like [yes,no], or column:NAME"],
    "rollout.structured.choices=[]": ["none of them empty"],
    "rollout.structured.json_schema={type:objekt}": ["is not a JSON schema: 'objekt'"],
    "rollout.structured.json_schema=gone.json": ["gone.json cannot be read: No such file or directory"],
    "rollout.structured.choices=column:options": ["Arithmetic has no column 'options'", "it has none"],
    "trainer.epochs=2": ["trainer.total_epochs", "trainer.total_steps"],
    "algorithm.ppo_epochs=2": ["learner.epochs_per_step", "learner.minibatches_per_step"],
    "learner.adam_eps=1e-6": ["AdamW's eps is 1e-8"],
    "learner.optimizer=sgd": ["the optimizer is AdamW"],
    "trainer.evaluation_samples=8": ["evaluation.samples"],
    "rollout.eval_temperature=0": ["evaluation.greedy", "evaluation.temperature"],
    "evaluation.pass_at_k=8": ["evaluation.samples"],
    "algorithm.cliprange=0.2": ["algorithm.clip_low and algorithm.clip_high"],
    "critic.lr=1e-5": ["did you mean critic.learning_rate?"],
    "trainer.steps=5": ["did you mean trainer.total_steps"],
    "trainer.max_steps=5": ["did you mean trainer.total_steps?"],
    "data.path=train.jsonl": ["Arithmetic does not have it; to read a file, use data=jsonl data.path=train.jsonl"],
    "data=train.jsonl": ["data=jsonl data.path=train.jsonl"],
    "reward=my_rewards.py": ["reward.function=my_rewards.NAME"],
    "algorithm.lambd=0.9": ["algorithm.gae_lambda, which the chosen algorithm does not have"],
    "data.train_files=x.jsonl": ["data.path, which the chosen data does not have"],
    "actor_rollout_ref.rollout.n=8": ["did you mean algorithm.samples_per_prompt?"],
    "algorithm.beta=0.1": ["did you mean algorithm.kl_coefficient?"],
    "algorithm=dpo trainer.beta=0.1": ["did you mean algorithm.beta?"],
    "algorithm=dpo algorithm.loss_type=kto_pair": ["1 problem", "that is algorithm=kto"],
    "algorithm=dpo algorithm.rpo_alpha=1": ["did you mean algorithm.nll_coefficient?"],
    "trainer.learning_rate=1e-5": ["did you mean learner.learning_rate?"],
    "trainer.max_length=512": ["rollout.max_prompt_tokens and rollout.max_response_tokens"],
    "trainer.num_train_epochs=3": ["did you mean trainer.total_epochs?"],
    "trainer.packing=true": ["always so"],
    "trainer.gradient_accumulation_steps=4": ["trainer.prompts_per_step", "learner.tokens_per_microbatch"],
    "trainer.precompute_ref_log_probs=true": ["learner.reference_cache"],
    "algorithm=distill": ["algorithm.teacher=VALUE (Folder of the teacher"],
    "teacher=x": ["algorithm=distill algorithm.teacher=FOLDER"],
    "data.path=a(b": ["1 problem", "cannot be parsed", "\"data.path='a(b'\""],
}
"""Arguments (␣ is a blank inside one) -> words of the answer."""


@pytest.mark.parametrize("typed", MISLEADING)
def test_a_mistake_is_answered_by_name(typed: str, refused: Typed) -> None:
    answer = refused(*(argument.replace("␣", " ") for argument in typed.split()))
    for words in MISLEADING[typed]:
        assert words in answer
    assert "Traceback" not in answer


WRONG = {
    "learner.learning_rate=1": ["moves every weight"],
    "learner.learning_rate=10": ["at most 1"],
    "algorithm=ppo critic.learning_rate=0.5": ["critic.learning_rate", "moves every weight"],
    "algorithm.entropy_coefficient=nan": ["must be finite"],
    "algorithm.entropy_coefficient=-5": ["at least 0"],
    "algorithm.kl_coefficient=1e9": ["at most 1000"],
    "algorithm.kl_coefficient=inf": ["must be finite"],
    "algorithm=ppo algorithm.process_coefficient=-1": ["at least 0"],
    "algorithm=prime algorithm.outcome_coefficient=nan": ["must be finite"],
    "buffer.min_group_reward=nan": ["must be finite"],
    "reward=[rule,polar] reward.parts.polar.weight=nan": ["reward.parts.polar.weight=nan: must be finite"],
    "trainer.best_metric=acuracy/heldout": ["did you mean accuracy/heldout?"],
    "trainer.best_metric=accuracy": ["did you mean accuracy/"],
    "seed=99999999999999999999": ["at most 9223372036854775807"],
    "cluster.address=127.0.0.1:1": ["no Ray answers there", "Connection refused", "ray start --head"],
    "run_dir=": ["run_dir=: is empty"],
    "run_dir=/": ["not a folder for a run's files"],
    "run_dir=.": ["not a folder for a run's files"],
    "run_dir=~": ["not a folder for a run's files"],
    "run_dir=/proc/x": ["not a folder for a run's files"],
    "run_dir=/dev/shm/../x": ["not a folder for a run's files"],
    "run_dir=things": ["holds other things (a.txt, b.txt, c.txt, ...) but no run"],
    "rollout.max_prompt_tokens=1": ["at least 8"],
    "trainer.prompts_per_step=1000000": ["need", "GiB of memory at their peak"],
    "rollout.max_concurrent_samples=1000000": ["at most 65536"],
    "trainer.step_timeout_seconds=1e-9": ["at least 1"],
    "trainer.startup_timeout_seconds=0.001": ["at least 1"],
    "reward=rule reward.timeout_seconds=1e-9": ["at least 0.1"],
    "trainer.max_staleness=100": ["could be sampled from the initial policy"],
    "data.heldout_problems=100000000": ["at most 1000000"],
    "reward=judge reward.base_url=http://127.0.0.1:1/v1 reward.model=m": ["no judge answers there"],
    "reward=polar reward.backend=http_vllm reward.urls=[http://127.0.0.1:1]": ["no POLAR server answers there"],
    "reward=[rule,format] reward.parts.rule.weight=0 reward.parts.format.weight=0": ["every reward is 0"],
    "model.chat_template=/etc/passwd": ["does not use `messages`"],
    "model.chat_template=no_messages.jinja": ["does not use `messages`"],
    "model.chat_template=broken.jinja": ["is not a Jinja template"],
    "model.chat_template=gone.jinja": ["no such file"],
    "data=jsonl data.path=train.jsonl data.heldout_path=train.jsonl": ["has the rows of data.path"],
    "data=jsonl data.path=train.jsonl data.heldout_path=copy.jsonl": ["has the rows of data.path (copy.jsonl)"],
    "data=jsonl data.path=one.jsonl": ["one.jsonl has only one question, so none can be held out"],
    "data=jsonl data.path=train.jsonl data.heldout_path=half.jsonl": ["32 of 64 rows cannot be used", "asks the same"],
    "data=jsonl data.path=long.jsonl": [
        "rollout.max_prompt_tokens=640 (set by model=tiny): at least 1 of the first 61 train prompts are longer",
        "the longest that was counted has 2010 tokens (long.jsonl:1)",
    ],
    "rollout.max_prompt_tokens=8": ["at least 1 of the first 64 train prompts are longer", "(arithmetic:"],
    "data=jsonl data.path=[my_rewards.py,train.jsonl] data.heldout_path=c*.jsonl": ["has the rows of data.path"],
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_value_that_cannot_be_meant_is_refused(typed: str, refused: Typed) -> None:
    answer = refused(*typed.split())
    for words in WRONG[typed]:
        assert words in answer
    assert "Traceback" not in answer


DOUBTFUL = {
    "trainer.prompts_per_step=10000": "80,000 responses in each of 60 steps (8 for each prompt), 4,800,000 in",
    "trainer.max_staleness=20": "a policy 20 updates old",
    "learner.learning_rate=0.05": "moves every weight",
    "algorithm.kl_coefficient=50": "outweighs the rewards",
    "trainer.best_metric=my_area/my_metric": "No metric of rlkit has this name",
    "data.train_problems=1": "the same questions several times",
    "cluster.address=auto": "no Ray is running on this machine",
}


@pytest.mark.parametrize("typed", DOUBTFUL)
def test_what_may_be_meant_is_warned_about(typed: str, accepted: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.config.places.ray_here", lambda: None)
    assert DOUBTFUL[typed] in accepted(typed)


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("run_dir=~/runs/x", "user/runs/x"),
        ("run_dir=~", None),
        ("run_dir=runs/ünïcode", "runs/ünïcode"),
        ("run_dir=runs/😀 x", "runs/😀 x"),
        ("run_dir=runs/lr=1e-5", "runs/lr=1e-5"),
        ("run_dir=~/runs/ü=${trainer.total_steps}", "user/runs/ü=60"),
        ("run_dir='~/a(b'", "user/a(b"),
        ("run_dir=empty", "user/empty"),
        ("run_dir=/dev/shm/a_run", "/dev/shm/a_run"),
    ],
)
def test_a_path_is_what_was_typed(typed: str, path: str | None, accepted: Typed, refused: Typed) -> None:
    if path is None:
        refused(typed)
    else:
        (line,) = re.findall(r"run folder +(.*)", accepted(typed))
        assert line.endswith(path)


def test_home_is_found_in_every_path(accepted: Typed) -> None:
    accepted("data=jsonl", "data.path=~/train.jsonl", "model.chat_template=~/template.jinja")


def test_a_folder_may_hold_the_notes_of_its_user(folder: Path, accepted: Typed) -> None:
    for name in ("start.sh", "out.log", ".gitkeep"):
        (folder / "empty" / name).touch()
    accepted("run_dir=empty")


def test_who_listens_is_found(accepted: Typed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        accepted("reward=judge", f"reward.base_url=http://127.0.0.1:{port}/v1", "reward.model=m")
        accepted(f"cluster.address=127.0.0.1:{port}")


def test_arguments_of_a_template_of_one_s_own_are_accepted(folder: Path, accepted: Typed, refused: Typed) -> None:
    (folder / "own.jinja").write_text("{{ messages }}{% if thinking is defined and thinking %}<think>{% endif %}")
    accepted("model.chat_template=own.jinja", "model.chat_template_arguments.thinking=false")
    text = refused("model.chat_template=own.jinja", "model.chat_template_arguments.thinkin=false")
    assert (
        "model.chat_template_arguments.thinkin=false: is not a variable of the chat template; it has thinking" in text
    )


def test_an_interval_of_the_preset_is_no_mistake_of_the_user(accepted: Typed) -> None:
    assert "is never reached" not in accepted("trainer.total_steps=2")
    assert "is never reached" in accepted("trainer.total_steps=2", "trainer.evaluate_every_steps=15")


@pytest.mark.parametrize(
    ("typed", "origin"),
    [
        ("", "0.0003 (set by model=tiny), constant"),
        ("learner.learning_rate=1e-5 learner.schedule=cosine", "1e-05 (as typed), cosine"),
        ("learner={learning_rate:2e-5}", "2e-05 (as typed), constant"),
        ("--config old.yaml", "4e-05 (from old.yaml), constant"),
        ("model=hf model.path=embedded:policy", "1e-06 (the default), constant"),
    ],
)
def test_the_plan_says_who_chose_the_learning_rate(typed: str, origin: str, folder: Path, accepted: Typed) -> None:
    (folder / "old.yaml").write_text("learner:\n  learning_rate: 4.0e-5\n")
    (line,) = re.findall(r"learning rate, learner +(.*)", accepted(*typed.split()))
    assert line == origin


def test_the_plan_says_what_only_the_start_can_check(folder: Path, accepted: Typed) -> None:
    assert "checked at the start" not in accepted()
    shutil.copytree(model_folder("embedded:policy"), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "a.B"}}))
    (folder / "model" / "tokenizer.json").rename(folder / "model" / "tokenizer.model")
    later = re.findall(r"checked at the start +(.*)", accepted("model.path=model", "model.trust_remote_code=true"))
    assert [text.split(" (")[0] for text in later] == [
        "the model's architecture, which docs/models.md does not list",
        "lengths of prompts",
    ]
    (folder / "my_data.py").write_text(
        "from rlkit.data.base import DataSource\n\n"
        "class Mine(DataSource):\n    def load(self, split):\n        return [], []\n\n"
        "    def provides(self):\n        return frozenset({'answer', 'references'})\n"
    )
    assert "lengths of prompts (the data source has no preview)" in accepted("data._target_=my_data.Mine")
