"""Real runs for the tests: a small MDS set, a tiny model, ``composer`` as a user would call it."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from processes import Forked, Real, Started
from streaming import MDSWriter

COMPOSER = Path(sys.executable).with_name("composer")
RECORDING = Path(__file__).with_name("recording.py")
PRETRAIN = Path(__file__).parent.parent / "pretrain.py"
TIMEOUT = 240.0  # seconds, for a run of a few steps on a busy machine

TINY = """
max_duration: 40ba
global_train_batch_size: 16
precision: fp32
device: cpu
progress_bar: false
save_interval: 5ba
model:
  embed_dim: 32
  vision_cfg: {image_size: 32, patch_size: 8, width: 32, layers: 2, head_width: 16}
  text_cfg: {width: 32, layers: 2, heads: 2}
  shared: {blocks: -1, ln_final: true, projection: true}
loss: {beta: 0.5}
data: {num_workers: 2, num_canonical_nodes: 2, pin_memory: false}
scheduler: {t_warmup: 5ba}
"""


def write_set(
    out: str, count: int = 256, dimension: int = 16, columns: str = "semantic", seed: int = 0
) -> None:
    """An image–text set of coloured gradients, in shards small enough that there are several."""
    rng = np.random.default_rng(seed)
    encodings = {"key": "str", "image": "bytes", "caption": "str"}
    if columns == "semantic":
        encodings["semantic"] = f"ndarray:float16:{dimension}"
    with MDSWriter(out=out, columns=encodings, hashes=["xxh64"], size_limit="12kb") as writer:
        for i in range(count):
            sample: dict[str, object] = {
                "key": f"{i:05}",
                "image": jpeg(rng),
                "caption": " ".join(
                    rng.choice(["red", "blue", "a", "dot", "on", "the", "left"], rng.integers(2, 9))
                ),
            }
            if columns == "semantic":
                sample["semantic"] = rng.normal(size=dimension).astype(np.float16)
            writer.write(sample)


def jpeg(rng: np.random.Generator, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> bytes:
    picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_config(
    folder: Path, remote: str, save_folder: str | None = None, text: str = TINY
) -> Path:
    """A YAML for a set at ``remote`` (cached in a folder of its own) or in a local folder."""
    stream = (
        f"remote: {remote}, local: {folder / 'cache'}" if "://" in remote else f"local: {remote}"
    )
    lines = text.replace("data: {", f"data: {{streams: {{e: {{{stream}}}}}, ", 1)
    lines += f"save_folder: {save_folder}\n" if save_folder else "autoresume: false\n"
    path = folder / "tiny.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(lines)
    return path


def launch(
    *arguments: str | Path,
    processes: int = 1,
    nodes: int = 1,
    cwd: Path,
    env: dict[str, str] | None = None,
    really: bool = False,
) -> Started:
    """Start ``composer -n N …`` in a session of its own; its output goes to ``cwd/output.txt``.

    Several ``nodes`` are as many launchers of ``processes`` ranks each, on this machine.
    ``really`` starts Composer's launcher as a shell would, for tests that are about it; all others
    fork it and its ranks from a process that has imported the stack.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    start = Real if really else Forked
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    begun, size = [], str(nodes * processes)
    meeting = ["--world_size", size, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    for node in range(nodes):
        place = ["--node_rank", str(node), "--base_rank", str(node * processes), *meeting]
        words = (COMPOSER, "-n", str(processes), *(place if nodes > 1 else []), *arguments)
        begun.append(start(*words, output=cwd / "output.txt", cwd=cwd, env=environment))
    return Nodes(begun) if nodes > 1 else begun[0]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class Nodes(Started):
    """The launchers of a run, one a node: as one command that ends as the worst of them."""

    def __init__(self, nodes: list[Started]) -> None:
        self.nodes, self.args, self.pid = nodes, nodes[0].args, nodes[0].pid

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = max((node.wait(timeout) for node in self.nodes), key=abs)
        return self.returncode

    def end(self) -> None:
        for node in self.nodes:
            node.signal_group(signal.SIGKILL)
        for node in self.nodes:
            node.wait(30)


def run(*arguments: str | Path, cwd: Path, status: int = 0, **options: Any) -> str:
    """Launch, wait, and return what was printed.

    Any other exit status than ``status`` is an error.
    """
    process = launch(*arguments, cwd=cwd, **options)
    try:
        code = process.wait(TIMEOUT)
    finally:
        process.end()
    text = (cwd / "output.txt").read_text()
    assert code == status, f"exit status {code}\n{text[-6000:]}"
    return text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def wait_for(condition: Callable[[], bool], process: Started, cwd: Path) -> None:
    """Until the condition holds; a run that ends before is an error."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        text = (cwd / "output.txt").read_text()[-6000:]
        assert process.poll() is None, f"ended too early\n{text}"
        assert time.monotonic() < deadline, f"waited too long\n{text}"
        time.sleep(0.1)


def steps(records: Path) -> list[dict[str, float]]:
    """The records of ``recording.py``, in the order in which they were written.

    Loss terms are floats again.
    """
    path = records / "steps.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: float.fromhex(v) if isinstance(v, str) else v for k, v in line.items()}
        for line in lines
    ]


def gradient_error(ours: Path, theirs: Path, step: int) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all parameters of a recorded step.

    The worst single parameter if that is more.
    """
    a, b = (
        torch.load(folder / f"gradients-{step}.pt", weights_only=True) for folder in (ours, theirs)
    )
    assert a.keys() == b.keys()

    def norm(tensors: list[torch.Tensor]) -> float:
        return float(torch.cat([t.flatten() for t in tensors]).norm())

    whole = norm([a[k] - b[k] for k in a]) / norm(list(b.values()))
    return max(whole, *(norm([a[k] - b[k]]) / norm([b[k]]) for k in b))
