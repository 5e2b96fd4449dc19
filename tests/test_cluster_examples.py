"""The examples for clusters: what can be said of them without a cluster, and the SLURM script on
nodes that are this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from composer.cli import launcher
from torch.distributed import run as torchrun

from alignclip.config.reading import load

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "cluster"
SLURM = FOLDER / "slurm.sh"
DOCKERFILE = FOLDER / "Dockerfile"
SERVICE, JOB = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ON_A_NODE = re.compile(r"on_a_node='(.*?)'\n", re.DOTALL)
RUN = re.compile(r"^run=\(\n(.*?)^\)\n", re.DOTALL | re.MULTILINE)

# srun starts the command once for each node, and ends as the worst of them
SRUN = """#!/bin/bash
shift # --kill-on-bad-exit
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" & started+=($!)
done
for one in "${started[@]}"; do wait "$one" || status=$?; done
exit "${status:-0}"
"""
# as many hosts as no pipe holds: a reader of the first line alone would end scontrol, and the job
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; seq 20000; else echo "$@" >> "$ASKED"; fi
"""


def slurm_text() -> str:
    return SLURM.read_text(encoding="utf-8")


def words_of_slurm() -> list[str]:
    """What the script gives to pretrain.py."""
    found = RUN.search(slurm_text())
    assert found
    return shlex.split(found[1])


def launcher_words(name: str) -> list[str]:
    """The launcher's arguments on a node, with numbers and a host for the variables."""
    found = ON_A_NODE.search(slurm_text())
    assert found
    line = next(
        line
        for line in found[1].replace("\\\n", "").splitlines()
        if line.strip().startswith(f"{name})")
    )
    line = re.sub(r"\$\(\(.*?\)\)", "32", line.replace('"$GPUS"', "8")).replace("$MASTER_ADDR", "a")
    return shlex.split(re.sub(r'"\$[A-Z_]+"', "4", line).split(f"exec {name} ")[1])[:-1]


def pod_words() -> list[str]:
    return [word.replace("$(NODE)", "3") for word in CONTAINER["args"]]


def test_the_script_is_bash_that_can_be_read() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    found = ON_A_NODE.search(slurm_text())
    assert found
    subprocess.run(["bash", "-n", "-c", found[1]], check=True)
    assert os.access(SLURM, os.X_OK)


@pytest.mark.parametrize("words", [words_of_slurm(), pod_words()], ids=["slurm", "kubernetes"])
def test_settings_are_taken(words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if word.endswith(".yaml"))
    config = load(ROOT / words[place], words[place + 1 :])
    assert config.autoresume
    assert "://" in str(config.save_folder)
    (stream,) = config.data.streams.values()
    assert "://" in str(stream.remote)
    assert stream.local
    assert config.data.num_canonical_nodes % 4 == 0  # nodes, of both


@pytest.mark.parametrize("words", [launcher_words("composer"), pod_words()], ids=["slurm", "k8s"])
def test_composers_launcher_takes_the_flags(words: list[str]) -> None:
    arguments = launcher._get_parser().parse_args(words)
    assert arguments.nproc == 8
    assert arguments.world_size == 32
    assert arguments.node_rank is not None
    assert arguments.master_addr
    assert arguments.master_port
    assert arguments.training_script == "pretrain.py"


def test_torchrun_takes_the_flags() -> None:
    arguments = torchrun.get_args_parser().parse_args(launcher_words("torchrun"))
    assert (arguments.nproc_per_node, arguments.nnodes) == ("8", "4")
    assert arguments.training_script == "pretrain.py"


def test_the_pods_find_one_another() -> None:
    service, job = SERVICE["spec"], JOB["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert service["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    arguments = launcher._get_parser().parse_args(pod_words())
    assert arguments.master_addr == f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    assert arguments.world_size == job["completions"] * arguments.nproc
    assert arguments.nproc == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    node = next(one for one in CONTAINER["env"] if one["name"] == "NODE")
    assert "job-completion-index" in node["valueFrom"]["fieldRef"]["fieldPath"]


def test_a_pod_has_room_time_to_save_and_no_secret() -> None:
    volumes: dict[str, Any] = {volume["name"]: volume["emptyDir"] for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["medium"] == "Memory"
    assert mounts["/dev/shm"]["sizeLimit"]
    below = {one["name"]: one.get("value") for one in CONTAINER["env"]}
    (local,) = (word for word in pod_words() if ".local=" in word)
    assert below["TMPDIR"] in mounts
    assert local.partition("=")[2].startswith(f"{below['TMPDIR']}/")
    assert POD["terminationGracePeriodSeconds"] >= 60  # the launcher's 30 s, and an upload's rest
    assert all("secretRef" in source for source in CONTAINER["envFrom"])
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.iterdir())
    assert not re.search(r"AWS_\w+\s*[=:]", text)


def test_a_pod_that_saved_does_not_count_as_a_failure() -> None:
    assert POD["restartPolicy"] == "Never"  # as a podFailurePolicy wants it
    assert JOB["spec"]["backoffLimit"] > 0
    actions = {
        number: rule["action"]
        for rule in JOB["spec"]["podFailurePolicy"]["rules"]
        for number in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {3: "FailJob", 143: "Ignore"}
    names = [rule.get("onExitCodes", {}) for rule in JOB["spec"]["podFailurePolicy"]["rules"]]
    assert all(name.get("containerName", CONTAINER["name"]) == CONTAINER["name"] for name in names)


def test_files_of_the_image_are_there() -> None:
    copied: list[str] = []
    for line in DOCKERFILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY "):
            copied += line.split()[1:-1]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"alignclip", "convert", "yamls", "pretrain.py", "evaluate.py"} <= set(copied)
    assert {"pyproject.toml", "constraints.txt"} <= set(copied)


def test_the_image_has_the_extras_of_the_project_and_another_user_than_root() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    extras = re.findall(r"--extra (\w+)", text)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    (user,) = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert int(user) == POD["securityContext"]["runAsUser"]
    assert f"--uid {user} " in text


class Cluster:
    """Stand-ins of srun and scontrol on PATH, and the variables of a job on several nodes."""

    def __init__(self, folder: Path, srun: str = SRUN, nodes: int = 2, ranks: int = 1) -> None:
        self.folder, self.asked = folder, folder / "asked"
        (folder / "bin").mkdir()
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        with socket.socket() as listener:
            # the port is 20000 and the job's last four digits
            for job in range(os.getpid() % 10000, 10000):
                try:
                    listener.bind(("127.0.0.1", 20000 + job))
                    break
                except OSError:
                    continue
        left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
        self.env = {name: value for name, value in os.environ.items() if name not in left} | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "ALIGNCLIP_VENV": sys.prefix,
            "USER": "somebody",
            "TMPDIR": str(folder),
            "ASKED": str(self.asked),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
            "SLURM_NNODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(ranks),
            "SLURM_STEP_NUM_TASKS": str(nodes),
            "SLURM_LOCALID": "0",
        }

    def start(self, script: Path = SLURM, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", script],
            cwd=ROOT,
            env=self.env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def requeued(self) -> bool:
        return self.asked.exists() and self.asked.read_text().startswith("requeue ")


@pytest.mark.parametrize(("status", "again"), [(143, True), (0, False), (2, False)])
def test_a_job_that_was_stopped_with_all_saved_goes_on_by_itself(
    status: int, again: bool, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, f"#!/bin/bash\nexit {status}\n")
    process = cluster.start()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert cluster.requeued() == again


def test_a_job_that_was_cancelled_does_not_come_back(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    cluster = Cluster(tmp_path, f"#!/bin/bash\ntouch {begun}\nsleep 0.5\nexit 143\n")
    process = cluster.start()
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert not cluster.requeued()


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End a job and all that it has started, where it doesn't end by itself."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def script_with(folder: Path, *settings: str) -> Path:
    """The SLURM script with another run than the recipe's."""
    script = folder / "slurm.sh"
    common = ["yamls/debug.yaml", f"save_folder={folder / 'saved'}", "scheduler.t_warmup=1ba"]
    script.write_text(RUN.sub(f"run=({' '.join([*common, *settings])})\n", slurm_text()))
    return script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes", "ranks"),
    [
        ("composer", 2, 1),
        pytest.param("composer", 3, 2, marks=pytest.mark.full),
        pytest.param("torchrun", 3, 1, marks=pytest.mark.full),
    ],
)
def test_the_script_trains_on_nodes(name: str, nodes: int, ranks: int, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=nodes, ranks=ranks)
    script = script_with(tmp_path, "max_duration=2ba", "global_train_batch_size=12")
    with ending(cluster.start(script, LAUNCHER=name)) as process:
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-6000:]
    assert f"{nodes * ranks} × cpu" in output
    assert "run 'debug' is done: 2 batches" in output
    assert (tmp_path / "saved" / "latest-rank0.pt").exists()
    assert not cluster.requeued()


@pytest.mark.slow
@pytest.mark.full
def test_a_run_whose_time_is_nearly_up_saves_and_is_requeued(tmp_path: Path) -> None:
    """SLURM signals all processes of the step, and not the script's shell."""
    cluster, records = Cluster(tmp_path), tmp_path / "saved" / "config.yaml"
    script = script_with(tmp_path, "max_duration=100000ba", "save_interval=90000ba")
    with ending(cluster.start(script)) as process:
        deadline = time.monotonic() + 240
        while not records.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)  # it is written before the first batch
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 143, output[-6000:]
    assert "stopped by a signal after batch" in output
    assert (tmp_path / "saved" / "latest-rank0.pt").exists()
    assert cluster.requeued()
