"""The golden run: what ``yamls/debug.yaml`` trains on, and how its loss falls.

A change of the code must leave it as it is, unless the change is about it. Then, and after an
upgrade of torch, write it anew, from the project's folder, and say so in the commit's message:

    python tests/golden.py
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import xxhash
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import get_device

from alignclip.config.reading import load
from alignclip.training.build import build_trainer
from alignclip.training.save_folder import SaveFolder

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "fixtures" / "debug"
STEPS, CROPS = FOLDER / "golden.json", FOLDER / "crops.npy"


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        samples: ids of the batch's samples, in their order.
        crops: hash of the batch's pixels.
        texts: hash of the batch's token ids.
        losses: term → value, as a hexadecimal float.
        gradient: norm of all gradients, as a hexadecimal float.
        lr: learning rate.
        logit_scale: exponentiated, after the step.
    """

    samples: list[int]
    crops: str
    texts: str
    losses: dict[str, str]
    gradient: str
    lr: float
    logit_scale: float


class Recorder(Callback):
    """Keeps each step of a run, and the pixels of the first batch."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.first_crops: np.ndarray | None = None
        self._lr = self._gradient = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        """Keep what the step begins with."""
        self._lr = float(state.optimizers[0].param_groups[0]["lr"])
        if self.first_crops is None:
            self.first_crops = state.batch["image"].numpy()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Keep the gradients' norm, before the optimizer's step clears them."""
        gradients = [p.grad.double() for p in state.model.parameters() if p.grad is not None]
        self._gradient = float(torch.stack([g.pow(2).sum() for g in gradients]).sum().sqrt())

    def batch_end(self, state: State, logger: Logger) -> None:
        """Keep the step."""
        batch = state.batch
        step = Step(
            samples=batch["sample"].tolist(),
            crops=xxhash.xxh64_hexdigest(batch["image"].contiguous().numpy()),
            texts=xxhash.xxh64_hexdigest(batch["text"].contiguous().numpy()),
            losses={name: float(value).hex() for name, value in state.total_loss_dict.items()},
            gradient=self._gradient.hex(),
            lr=self._lr,
            logit_scale=float(state.outputs[2].detach()),
        )
        self.steps.append(step)


def train(save_folder: Path) -> Recorder:
    """Train ``yamls/debug.yaml`` in this process."""
    paths = [f"save_folder={save_folder}", f"data.streams.scenes.local={FOLDER / 'mds'}"]
    config = load(ROOT / "yamls" / "debug.yaml", [*paths, "progress_bar=false"])
    recorder = Recorder()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on several, sums are in another order
    try:
        trainer = build_trainer(config, get_device("cpu"), SaveFolder(config), [recorder])
        trainer.fit()
        trainer.close()
    finally:
        torch.set_num_threads(threads)
    return recorder


def platform() -> dict[str, str]:
    """What the last bit of a number depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = [line.partition(":") for line in lines[: lines.index("")]]
    known = {name.strip(): value.strip() for name, _, value in fields}
    cpu = " ".join(known.get(name, "") for name in ("vendor_id", "cpu family", "model"))
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": f"{cpu} {capability}"}


def written_on() -> dict[str, str]:
    """The platform of the golden run."""
    return dict(json.loads(STEPS.read_text(encoding="utf-8"))["platform"])


def is_the_platform() -> bool:
    """Whether the last bits can be compared with those of the golden run."""
    return written_on() == platform()


def write() -> None:
    """Write the golden run anew."""
    with TemporaryDirectory() as folder:
        recorder = train(Path(folder))
    steps = ",\n".join(json.dumps(asdict(step)) for step in recorder.steps)
    text = f'{{"platform": {json.dumps(platform())}, "steps": [\n{steps}\n]}}\n'
    STEPS.write_text(text, encoding="utf-8")
    assert recorder.first_crops is not None
    np.save(CROPS, recorder.first_crops)


if __name__ == "__main__":
    write()
