"""Stand-ins for what a run never calls: what is promised, what is not imported, and what is real
for those who use it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import processes
import pytest

from alignclip.runtime import stand_ins
from alignclip.runtime.stand_ins import STAND_INS, Promise, StandIn

ROOT = Path(__file__).parents[1]
PROJECT = {
    "heavy/__init__.py": "from heavy.classes import Base, Other\nNUMBER = 7\n",
    "heavy/classes.py": "class Base:\n    depth = 1\nclass Other: pass\ndef f(): return 'called'\n",
    "user.py": textwrap.dedent(
        """
        import heavy
        from heavy import Base
        from heavy.classes import f

        def is_one(value: Base | None) -> bool:
            return isinstance(value, Base) or isinstance(value, Base | int)
        """
    ),
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package that takes long to import, and a module that imports it at its top."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stand_ins, "STAND_INS", {"heavy": ("Base",), "heavy.classes": ("f",)})
    monkeypatch.setattr(sys, "modules", sys.modules)
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in {"heavy", "user", "missing"}:
            del sys.modules[name]


def is_real(name: str) -> bool:
    return name in sys.modules and not isinstance(sys.modules[name], StandIn)


def test_a_promise_is_kept_when_it_is_used(project: None) -> None:
    with stand_ins.stand_ins():
        import user  # type: ignore[import-not-found]
    assert "heavy" not in sys.modules
    assert not user.is_one("text")
    assert user.is_one(3)
    assert "heavy" not in sys.modules  # asking imports nothing
    assert user.f() == "called"
    assert is_real("heavy")
    assert user.Base.depth == 1
    assert user.heavy.NUMBER == 7

    import heavy  # type: ignore[import-not-found]

    class Derived(user.Base):  # type: ignore[misc]
        pass

    assert Derived.__mro__[1] is heavy.Base
    assert user.is_one(heavy.Base())
    assert user.is_one(Derived())
    assert issubclass(Derived, user.Base)
    assert not user.is_one(heavy.Other())
    assert "Other" in dir(user.heavy)


def test_what_is_not_promised_is_imported_at_once(project: None) -> None:
    with stand_ins.stand_ins():
        import user
        from heavy import NUMBER, Base
    assert is_real("heavy")
    assert NUMBER == 7
    assert not isinstance(Base, Promise)
    assert isinstance(Base(), user.Base)


def test_a_class_that_derives_in_the_block_gets_the_real_one(project: None) -> None:
    with stand_ins.stand_ins():
        import user

        class Derived(user.Base):  # type: ignore[misc]
            pass

    assert is_real("heavy")
    assert Derived.__mro__[1] is sys.modules["heavy"].Base


def test_a_module_that_was_imported_before_stays(project: None) -> None:
    import heavy

    with stand_ins.stand_ins():
        import user
    assert user.Base is heavy.Base
    assert sys.modules["heavy"] is heavy


def test_a_package_that_is_missing_is_missing(
    project: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stand_ins.STAND_INS, "missing", ())
    with stand_ins.stand_ins(), pytest.raises(ModuleNotFoundError):
        import missing  # type: ignore[import-not-found]  # noqa: F401
    with stand_ins.stand_ins(), pytest.raises(ImportError):
        from heavy.nothing import what  # type: ignore[import-not-found]  # noqa: F401


def test_other_threads_get_the_real_thing(project: None) -> None:
    def work() -> None:
        import heavy

        found.append(heavy)

    found: list[Any] = []
    with stand_ins.stand_ins(), stand_ins.stand_ins():  # the inner one is a part of the outer one
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not isinstance(found[0], StandIn)


@pytest.mark.slow
def test_what_is_promised_is_there() -> None:
    """The contract with the packages: a class or function, and no exception, which ``except``
    would not take.
    """
    code = f"""
        import importlib, inspect
        for module, names in {STAND_INS!r}.items():
            for name in names:
                found = getattr(importlib.import_module(module), name)
                assert inspect.isclass(found) or inspect.isfunction(found), (module, name)
                assert not (inspect.isclass(found) and issubclass(found, BaseException))
    """
    done = processes.python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def fresh(folder: Path, code: str, *arguments: str) -> Any:
    """What a new interpreter prints last, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = {
    "torchmetrics", "transformers", "sklearn", "scipy", "pandas", "matplotlib", "wandb", "mcli",
    "networkx", "paramiko", "composer.metrics", "timm.models.resnet",
}  # fmt: skip
TRAIN = """
    import json, sys
    sys.path[:0] = [{root!r}, "."]
    from alignclip.training.command import main
    status = main([{root!r} + "/yamls/debug.yaml", *sys.argv[1:]])
    assert status == 0
"""
STEP = ("max_duration=2ba", "scheduler.t_warmup=1ba", f"data.streams.scenes.local={ROOT}/tests/"
        "fixtures/debug/mds")  # fmt: skip


@pytest.mark.slow
def test_training_imports_nothing_that_it_never_calls(tmp_path: Path) -> None:
    code = TRAIN.format(root=str(ROOT)) + "    print(json.dumps([*sys.modules]))"
    imported = fresh(tmp_path, code, *STEP, "save_folder=null", "autoresume=false")
    assert {"composer", "streaming", "open_clip", "timm.optim"} <= {*imported}
    assert HEAVY.isdisjoint(imported)


OWN = """
import timm
import torch
import transformers
from composer import Callback
from composer.core.state import Metric
from composer.metrics import MIoU
from torchmetrics.classification import BinaryAccuracy

class Mine(Callback):
    def fit_end(self, state, logger):
        accuracy = BinaryAccuracy()
        accuracy.update(torch.ones(2), torch.tensor([1, 0]))
        logger.log_metrics({"accuracy": float(accuracy.compute())})
        assert isinstance(accuracy, Metric) and isinstance(MIoU(2), Metric)
        assert transformers.BertConfig().hidden_size == 768
        assert "resnet18" in timm.list_models()
"""


@pytest.mark.slow
def test_what_a_run_does_use_is_real(tmp_path: Path) -> None:
    """A callback and loggers that use what is stood in for."""
    (tmp_path / "own.py").write_text(OWN)
    code = TRAIN.format(root=str(ROOT)) + "    print(json.dumps([*sys.modules]))"
    loggers = (
        "loggers.WandBLogger.project=x",
        "loggers.WandBLogger.init_kwargs.mode=offline",
        "loggers.TensorboardLogger.log_dir=events",
        "loggers.FileLogger.filename=log.txt",
        "algorithms.EMA.half_life=2ba",
        "callbacks={own.Mine: {}}",
        "compile_config.backend=eager",
    )
    imported = fresh(tmp_path, code, *STEP, "save_folder=runs", *loggers)
    assert {"torchmetrics", "transformers", "wandb", "composer.metrics"} <= {*imported}
    assert "[metric][batch=2]: accuracy: 0.5" in (tmp_path / "log.txt").read_text()
    assert [*tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert [*tmp_path.rglob("events.out.tfevents*")]


SET = f"{ROOT}/tests/fixtures/debug/mds"
VERIFY = f"from alignclip.verification.command import main; main([{SET!r}])"
EVALUATE = f"""
import alignclip
alignclip.evaluate
from alignclip.config.reading import load
from alignclip.model.encoders import build_encoders
model = build_encoders(load("yamls/debug.yaml", []).model)
pairs = {{"task": "retrieval", "local": {SET!r}, "num_workers": 0}}
alignclip.evaluate(model, {{"pairs": pairs}}, progress=False)
"""
USES = {
    "alignclip.load": "import alignclip; alignclip.load",
    "alignclip.dataset": f"import alignclip; alignclip.dataset({SET!r})[0]",
    "alignclip.evaluate": EVALUATE,
    "a spawned data worker": "import alignclip.data.dataset",
    "a worker of conversion": "import alignclip.conversion.mds_writer",
    "convert/verify.py": VERIFY,
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_other_commands_import_nothing_that_they_never_call(use: str) -> None:
    code = f"import json, sys\n{USES[use]}\nprint(json.dumps([*sys.modules]))"
    imported = fresh(ROOT, code)
    assert "torch" in imported
    assert HEAVY.isdisjoint(imported)
    assert {"torch._dynamo", "sympy"}.isdisjoint(imported)


@pytest.mark.slow
def test_other_packages_are_whole_for_others() -> None:
    """What open_clip, torch and torchvision have, once a person's code uses it."""
    code = """
        import json, sys, alignclip
        alignclip.load
        assert "open_clip" in sys.modules
        import torch
        assert not {"torch._dynamo", "_dynamo"} & {*sys.modules, *vars(torch)}
        import transformers, open_clip
        from open_clip.coca_model import CoCa
        from open_clip.hf_model import HFTextEncoder
        assert transformers.BertConfig().hidden_size == 768
        assert open_clip.CoCa.generate is CoCa.generate
        assert open_clip.model.HFTextEncoder.forward is HFTextEncoder.forward
        model = open_clip.create_model("coca_ViT-B-32", device="meta")
        assert isinstance(model, open_clip.CoCa) and type(model) is CoCa
        from torchvision import ops, tv_tensors
        from torchvision.transforms.v2 import functional
        assert torch._dynamo.config.optimize_ddp and vars(torch)["_dynamo"]
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
        image = tv_tensors.Image(torch.zeros(3, 4, 4))
        assert isinstance(functional.resize(image, [2, 2]), tv_tensors.Image)
        box = torch.tensor([[0.0, 0, 0, 4, 4]])
        assert ops.roi_align(torch.rand(1, 1, 8, 8), box, 2).shape == (1, 1, 2, 2)
        print(json.dumps(1))
    """
    assert fresh(ROOT, code) == 1
