"""What `rlkit.submit` decides without a cluster: its arguments, the upload, resources, the job, exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from submit_fixture import ROOT

from rlkit.cluster.ray_session import ray_session
from rlkit.config.checks import run_checks
from rlkit.config.command import split_off_file
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.overrides import quoted
from rlkit.config.report import plan, plan_text
from rlkit.config.schema import ClusterConfig
from rlkit.jobs.cluster import ClusterError, connect, dashboard_address, exit_code
from rlkit.jobs.resources import Demand, Node, demands, missing
from rlkit.jobs.submission import (
    CONFIG_IN_ARCHIVE,
    ELSEWHERE,
    SubmitConfig,
    check_here,
    environment,
    make_job,
    read_arguments,
    relative_path_problems,
    resume_warnings,
)
from rlkit.jobs.upload import MIB, UploadError, collect, pack
from rlkit.submit import main

BASE = ["reward=rule", "model.path=embedded:policy"]


def make_files(folder: Path, *names: str, size: int = 10) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))


# Arguments


def test_arguments_of_the_job_are_taken_out() -> None:
    typed = ["reward=rule", "cluster.address=http://h:8265", "submit.code=installed", "submit.exclude=[data,'*.ckpt']"]
    arguments = read_arguments(typed)
    assert arguments.overrides == ["reward=rule"]
    assert arguments.address == "http://h:8265"
    assert arguments.submit.code == "installed"
    assert arguments.submit.exclude == ("data", "*.ckpt")
    assert arguments.problems == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("submit.cod=upload", "did you mean submit.code?"),
        ("submit.code=uplod", "did you mean upload?"),
        ("submit.max_upload_mib=1000", "at most 450"),
        ("submit.stop_seconds=true", "must be an integer"),
        ("submit={code: upload}", "is a section"),
    ],
)
def test_wrong_arguments_of_the_job(typed: str, said: str) -> None:
    (problem,) = read_arguments([typed]).problems
    assert said in str(problem)


def test_problems_of_run_and_job_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit.cod=upload", "reward=rul", "cluster.address=http://h:1"]) == 2
    said = capsys.readouterr().err
    assert "2 problems" in said
    assert "submit.code?" in said
    assert "did you mean rule?" in said


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["lits"], "did you mean list?"),
        (["status"], "takes one name"),
        (["list", "run"], "takes no name"),
        (["stop", "run", "reward=rule"], "has no effect with stop"),
    ],
)
def test_wrong_commands(typed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed) == 2
    assert said in capsys.readouterr().err


def test_training_itself_refuses_a_dashboard_s_address() -> None:
    with pytest.raises(ConfigError, match=r"python -m rlkit\.submit"):
        load_config([*BASE, "cluster.address=http://127.0.0.1:8265"])


def test_paths_of_the_cluster_are_warnings(tmp_path: Path) -> None:
    arguments = [*BASE, "data=jsonl", "data.path=/nowhere/train.jsonl", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="no such file"):
        load_config(arguments)
    run = load_config(arguments, elsewhere=["/nowhere/train.jsonl"])
    assert any("/nowhere/train.jsonl" in str(warning) for warning in run.warnings)


def test_configuration_file_travels_and_may_name_the_cluster_s_paths(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("model:\n  path: /nowhere/model\nseed: 3\n")
    checked = check_here(["reward=rule", f"run_dir={tmp_path / 'run'}"], file, ROOT)
    assert checked.run.config.seed == 3
    assert any("/nowhere/model" in str(warning) for warning in checked.run.warnings)


def test_the_run_need_not_fit_on_this_machine(tmp_path: Path) -> None:
    typed = [*BASE, "cluster.address=http://h:8265", f"run_dir={tmp_path / 'run'}", "cluster.threads_per_actor=1000"]
    large = [*typed, "rollout.memory_gib=100000"]
    checked = check_here(large, None, ROOT)
    assert checked.warnings == []
    host = [line for line in plan_text(plan(checked.run)).splitlines() if "host, " in line]
    assert not any("this machine" in line for line in host)
    assert host[-1].endswith("GiB") and " of " not in host[-1]
    with pytest.raises(ConfigError, match=r"it has 2\.0 GiB"):
        check_here([*large, "cluster.host_memory_gib=2"], None, ROOT)


def test_more_gpus_than_a_machine_has_are_the_cluster_s(tmp_path: Path) -> None:
    wide = [*BASE, "cluster=single_gpu", "learner.ranks=16", f"run_dir={tmp_path / 'run'}"]
    assert "cluster.address" in str(load_config(wide).warnings)
    assert check_here([*wide, "cluster.address=http://h:8265"], None, ROOT).warnings == []


@pytest.mark.parametrize(
    "typed",
    [
        ["data=jsonl", "data.path=[/nowhere/a.jsonl,/nowhere/b.jsonl]"],
        ["data=jsonl", "data.path='/nowhere/a, b.jsonl'"],
        ["data=jsonl", "data={path: /nowhere/a.jsonl}"],
        ["data=mixture", "data.sources={a: {kind: jsonl, path: /nowhere/a.jsonl}}"],
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_the_cluster_s_paths_may_be_in_lists_and_sections(typed: list[str], in_file: bool, tmp_path: Path) -> None:
    run, file = [*BASE, f"run_dir={tmp_path / 'run'}"], None
    if in_file:
        values = load_config([*run, *typed], elsewhere=["/nowhere"]).config.data
        file = tmp_path / "old.yaml"
        file.write_text(yaml.safe_dump({"data": values}))
        typed = []
    warnings = check_here([*run, *typed], file, ROOT).warnings
    assert [text for text in warnings if "/nowhere/a" in text and text.endswith(ELSEWHERE)]


def test_a_broken_configuration_file_is_reported_once(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("model: [")
    with pytest.raises(ConfigError, match=r"1 problem(.|\n)*cannot be read"):
        check_here(BASE, file, ROOT)


def test_a_text_too_long_for_a_path_is_none(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(f"unknown: /{'a' * 400}\n")
    with pytest.raises(ConfigError, match="unknown"):
        check_here(BASE, file, ROOT)


def test_a_run_to_go_on_from_is_named_by_an_absolute_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume=runs/old: .*absolute path"):
        check_here([*BASE, f"run_dir={tmp_path / 'run'}", "resume=runs/old"], None, ROOT)


def test_what_resume_finds_here_is_said_and_refuses_nothing(tmp_path: Path) -> None:
    run = [*BASE, f"run_dir={tmp_path / 'run'}"]
    checked = check_here([*run, "resume=/nowhere/old"], None, ROOT)
    assert [text for text in resume_warnings(checked.run.config) if "/nowhere/old" in text and "no such folder" in text]
    (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    (broken,) = resume_warnings(check_here([*run, "resume=auto"], None, ROOT).run.config)
    assert "no checkpoint" in broken and "is intact" in broken


# The address


@pytest.mark.parametrize("given", ["ray://h:10001", "file:///etc", "", None])
def test_addresses_of_other_kinds_are_refused(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"http://HOST:8265"):
        dashboard_address(given)


def test_address_may_lack_its_scheme() -> None:
    assert dashboard_address("h:8265") == "http://h:8265"
    assert dashboard_address("https://h/ray/") == "https://h/ray"


def test_nobody_there() -> None:
    with pytest.raises(ClusterError, match="connection refused"):
        connect("http://127.0.0.1:1")


# The upload


@pytest.mark.parametrize("git", [True, False])
def test_outputs_environments_and_ignored_files_stay_here(git: bool, tmp_path: Path) -> None:
    make_files(
        tmp_path, "train.py", "lib/runs/code.py", "runs/a/metrics.jsonl", "outputs/x", "env/pyvenv.cfg", "env/lib.py"
    )
    make_files(tmp_path, "lib/__pycache__/m.pyc", ".venv/x.py", "sweep/one/metrics.jsonl", "sweep/one/config.yaml")
    make_files(tmp_path, "sweep/one/checkpoints/x", "notes/a.txt", "data/x.bin", ".env", "vendored/own.py")
    if git:
        (tmp_path / ".gitignore").write_text("data/\n")
        for checkout in (tmp_path, tmp_path / "vendored"):
            subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    upload = collect(tmp_path, ["notes/"] if git else ["notes", "data"], 20, 100)
    assert set(upload.files) - {".gitignore"} == {"train.py", "lib/runs/code.py", "vendored/own.py"}


def test_large_files_are_left_out_by_name(tmp_path: Path) -> None:
    make_files(tmp_path, "a.py")
    make_files(tmp_path, "model.bin", size=2 * MIB)
    upload = collect(tmp_path, [], 1, 100)
    assert list(upload.files) == ["a.py"]
    assert "not uploaded: model.bin (2.0 MiB, above submit.max_file_mib)" in upload.lines()


def test_too_much_names_the_largest(tmp_path: Path) -> None:
    make_files(tmp_path, "small.py")
    make_files(tmp_path, "data/big.jsonl", size=2 * MIB)
    with pytest.raises(UploadError, match=r"2\.0 MiB .*more than submit\.max_upload_mib=1\.(.|\n)*data/big\.jsonl"):
        collect(tmp_path, [], 20, 1)


def test_nothing_to_upload(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match="no file"):
        collect(tmp_path, [], 20, 100)


def test_archive_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    folder, config = tmp_path / "code", tmp_path / "old.yaml"
    make_files(folder, "b.py", "a/c.py")
    config.write_text("seed: 3\n")
    packages = []
    for name in ("one.zip", "two.zip"):
        (folder / "b.py").touch()
        pack(collect(folder, [], 20, 100), tmp_path / name, {CONFIG_IN_ARCHIVE: config})
        packages.append((tmp_path / name).read_bytes())
    assert packages[0] == packages[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["a/c.py", "b.py", CONFIG_IN_ARCHIVE]
        assert archive.read(CONFIG_IN_ARCHIVE) == b"seed: 3\n"


@pytest.mark.parametrize("git", [True, False])
def test_links_to_files_travel_and_links_to_folders_are_named(git: bool, tmp_path: Path) -> None:
    project = tmp_path / "project"
    make_files(project, "a.py", "big/x.jsonl")
    make_files(tmp_path, "outside.jsonl", size=30)
    (project / "linked.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (project / "data").symlink_to("big")
    if git:
        subprocess.run(["git", "init", "-q", str(project)], check=True)
    upload = collect(project, ["big"], 20, 100)
    assert upload.files == {"a.py": 10, "linked.jsonl": 30}
    assert "not uploaded: data (a link to a folder)" in upload.lines()
    pack(upload, tmp_path / "one.zip", {})
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("linked.jsonl") == bytes(30)


def test_this_repository_can_be_uploaded() -> None:
    upload = collect(ROOT, [], 20, 100)
    assert {"rlkit/train.py", "conf/config.yaml", "rewards/base.py"} <= set(upload.files)
    assert not any(name.startswith((".git/", ".venv/", "runs/")) for name in upload.files)


@pytest.fixture
def path_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What is said of a relative data.path, of a project with files that travel, files that do not, and links."""
    project = tmp_path / "project"
    for name in ("inside", "code/within", "code/left_out", "data/left_out", "../outside"):
        path = project / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"1 + {i}?", "answer": f"#### {1 + i}"} for i in range(2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (project / "code_again").symlink_to("code")
    monkeypatch.chdir(project)
    upload = collect(project, ["data", "left_out.jsonl"], 20, 100)

    def problems(path: str, *, code: str = "upload") -> list[str]:
        run = load_config([*BASE, "data=jsonl", f"data.path={path}", f"run_dir={tmp_path / 'run'}"])
        found = relative_path_problems(run, upload if code == "upload" else None, project)
        return [str(problem) for problem in found]

    return problems


def test_relative_paths_must_travel(path_problems: Callable[..., list[str]], tmp_path: Path) -> None:
    assert path_problems("inside.jsonl") == []
    assert path_problems(str(tmp_path / "project" / "data" / "left_out.jsonl")) == []
    assert "not among the uploaded files" in path_problems("data/left_out.jsonl")[0]
    assert "not among the uploaded files" in path_problems("../outside.jsonl")[0]
    assert "submit.code=installed" in path_problems("inside.jsonl", code="installed")[0]


@pytest.mark.parametrize(
    "path", ["./code/../inside.jsonl", "link.jsonl", "[inside.jsonl,code/within.jsonl]", "code/with*"]
)
def test_what_travels_under_its_name(path: str, path_problems: Callable[..., list[str]]) -> None:
    assert path_problems(path) == []


@pytest.mark.parametrize(
    ("path", "lacking"),
    [
        ("[inside.jsonl,data/left_out.jsonl]", "data/left_out.jsonl"),
        ("data/*.jsonl", "data/left_out.jsonl"),
        ("code/*.jsonl", "code/left_out.jsonl"),  # the job would find fewer files
        ("code_again/within.jsonl", "code_again/within.jsonl"),  # a link to a folder
        ("../project/inside.jsonl", "../project/inside.jsonl"),  # the job's folder has another name
    ],
)
def test_what_does_not_travel_under_its_name(path: str, lacking: str, path_problems: Callable[..., list[str]]) -> None:
    (problem,) = path_problems(path)
    assert f"{lacking} is not among the uploaded files" in problem


def test_patterns_need_the_folder_too(path_problems: Callable[..., list[str]]) -> None:
    assert "submit.code=installed" in path_problems("code/with*.jsonl", code="installed")[0]


# Resources


def test_gpus_that_are_missing() -> None:
    wanted = [Demand("vLLM engine", 2, 1, 2.0), Demand("learner rank", 4, 1, 1.0)]
    eight = [Node("a", 8, 4), Node("b", 8, 4)]
    assert missing(wanted, eight) == ([], [])
    lacking, _ = missing(wanted, [Node("a", 8, 4), Node("b", 8, 3)])
    assert "no room for 1 learner rank." in lacking[0]
    assert "a: 4, b: 3" in lacking[0]
    lacking, _ = missing([Demand("vLLM engine", 1, 1, 4.0)], [Node("a", 8, 2), Node("b", 8, 2)])
    assert "no room for 1 vLLM engine" in lacking[0], "an engine does not span nodes"
    assert missing(wanted, [])[0] == ["the cluster has no live node"]


def test_shares_of_a_gpu_fit_into_one(tmp_path: Path) -> None:
    run = load_config([*BASE, "cluster=single_gpu", "algorithm=ppo", "reward.workers=3", f"run_dir={tmp_path / 'run'}"])
    kinds = {"vLLM engine", "learner rank", "critic rank", "reward worker", "colocated group"}
    assert {demand.what for demand in demands(run)} == kinds
    assert missing(demands(run), [Node("a", 64, 1)]) == ([], [])
    assert missing(demands(run), [Node("a", 64, 0)])[0] != []


@pytest.mark.parametrize(
    ("overrides", "enough", "too_few"),
    [
        (["learner.ranks=3"], [3], [2]),  # shares that would fit on one GPU are of several
        (["rollout.workers=3", "learner.ranks=2"], [1, 2], [2]),
        (["rollout.tensor_parallel_size=2", "learner.ranks=3"], [2, 1], [1, 1, 1]),  # an engine does not span nodes
        (["rollout.tensor_parallel_size=2", "rollout.workers=2"], [5], [3, 1]),
        (["rollout.tensor_parallel_size=2", "learner.ranks=3", "cluster.placement=apart"], [2, 3], [2, 2]),
    ],
)
def test_colocated_groups_have_whole_gpus(
    tmp_path: Path, overrides: list[str], enough: list[int], too_few: list[int]
) -> None:
    run = load_config(
        [*BASE, "cluster=single_gpu", "trainer.prompts_per_step=24", f"run_dir={tmp_path / 'run'}", *overrides]
    )
    assert missing(demands(run), [Node("n", 64, gpus) for gpus in enough])[0] == []
    assert "not enough GPUs" in missing(demands(run), [Node("n", 64, gpus) for gpus in too_few])[0][0]


def test_a_reward_that_is_not_asked_has_no_workers(tmp_path: Path) -> None:
    recorded = ["algorithm=sft", "rollout.source=data", "cluster=multi_gpu", "cluster.placement=apart"]
    run = load_config(["model.path=embedded:policy", *recorded, f"run_dir={tmp_path / 'run'}"], elsewhere=())
    assert run.reward_class.traits(run.reward_config).uses_gpu
    assert [(demand.what, demand.count) for demand in demands(run) if demand.gpus] == [("learner rank", 8)]
    assert missing(demands(run), [Node("a", 64, 8)])[0] == []


def test_few_cpus_only_warn(tmp_path: Path) -> None:
    run = load_config([*BASE, "cluster.threads_per_actor=4", f"run_dir={tmp_path / 'run'}"])
    lacking, slow = missing(demands(run), [Node("a", 2, 0)])
    assert lacking == []
    assert "up to 9 CPU threads, which share the cluster's 2 CPUs" in slow[0]


# The job


def test_the_job_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shell of the cluster makes of the command is what was typed here."""
    folder = tmp_path / "a run's {folder}"
    typed = [*BASE, "trainer.total_steps=3", f"run_dir={quoted(str(folder))}"]
    run = load_config(typed)
    job = make_job(run, typed, False, SubmitConfig(python="/opt/bin/python"))
    words = shlex.split(job["entrypoint"])
    assert words[:4] == ["exec", "/opt/bin/python", "-m", "rlkit.train"]
    again = load_config(words[4:])
    assert again.config == run.config
    assert again.config.run_dir == folder
    assert job["metadata"] == {"rlkit_run": folder.name, "rlkit_run_dir": str(folder)}
    assert " " not in job["submission_id"]
    file, _ = split_off_file(shlex.split(make_job(run, typed, True, SubmitConfig())["entrypoint"])[4:])
    assert file == Path(CONFIG_IN_ARCHIVE)


def test_environment_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    made = environment(SubmitConfig(pass_environment=("A_KEY",), environment={"B": "2"}, stop_seconds=5))
    assert made["A_KEY"] == "secret"
    assert made["B"] == "2"
    assert made["HF_HUB_OFFLINE"] == "0"
    assert made["RAY_JOB_STOP_WAIT_TIME_S"] == "5"
    assert not any("TOKEN" in name for name in made if name.startswith("RAY_")), "the cluster has its own"


def test_variable_that_is_not_set_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ConfigError, match="NOT_THERE is not set here"):
        check_here([*BASE, "submit.pass_environment=[NOT_THERE]"], None, ROOT)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", -9, 137), ("STOPPED", None, 143)],
)
def test_exit_codes(state: str, code: int | None, expected: int) -> None:
    details: Any = SimpleNamespace(status=SimpleNamespace(value=state), driver_exit_code=code)
    assert exit_code(details) == expected


def test_run_folder_in_ray_s_own_files_is_warned_of() -> None:
    folder = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/x")
    (finding,) = run_checks({"run_dir": folder})
    assert finding.warning
    assert "deletes" in finding.message


# Examples


def test_kuberay_manifest() -> None:
    """The fields are those of the RayJob resource (ray.io/v1), and its command is a valid run."""
    (job,) = yaml.safe_load_all((ROOT / "examples" / "kuberay" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        *("entrypoint", "runtimeEnvYAML", "jobId", "metadata", "submissionMode", "submitterPodTemplate", "suspend"),
        *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"),
        *("rayClusterSpec", "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy"),
        *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources"),
    }
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]) == set(environment(SubmitConfig()))
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "rlkit.train"]
    paths = [word.partition("=")[2] for word in words if "=/" in word]
    run = load_config(words[3:], elsewhere=paths)
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    nodes = []
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        limits = pod["containers"][0]["resources"]["limits"]
        nodes += [Node("pod", float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))] * group.get("replicas", 1)
    assert missing(demands(run), nodes)[0] == []
    installed = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('ray'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert cluster["rayVersion"] == installed.stdout.strip()


def test_example_environment_is_what_submit_sets() -> None:
    example = yaml.safe_load((ROOT / "examples" / "ray_job" / "runtime_env.yaml").read_text())
    assert set(example["env_vars"]) == set(environment(SubmitConfig()))
    assert all(isinstance(value, str) for value in example["env_vars"].values())


def test_example_commands_validate(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "ray_job" / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "rlkit.submit cluster" in line or "rlkit.train" in line]
    commands = [shlex.split(line.partition("rlkit.")[2])[1:] for line in lines if line.startswith(("python", "ray"))]
    assert len(commands) == 2
    for typed in commands:
        assert check_here(typed, None, ROOT).run.config.trainer.total_steps == 2


def test_joining_a_cluster_that_is_not_there_ends_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ConnectionError, match=r"no Ray answers at 127\.0\.0\.1:1 "),
        ray_session(ClusterConfig(address="127.0.0.1:1"), tmp_path, 2**30),
    ):
        pass
