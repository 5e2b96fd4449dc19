"""What happens on one rank reaches all of them: results, and errors of any kind."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
import torch
from runs import write_config

import alignclip
from alignclip import ranks
from alignclip.config.reading import load
from alignclip.errors import NOT_SAVED, UserError
from alignclip.training.resume import starting_point
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.checkpoint_file import NotSavedError

WAYS: dict[str, Callable[[Callable[[], str]], str]] = {
    "on rank 0": ranks.run_on_rank_zero,
    "once a machine": ranks.run_once_per_machine,
    "first rank first": ranks.local_rank_zero_first,
}


def outcome(action: Callable[[], object]) -> str:
    try:
        return str(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def results(failing: int, error: Exception) -> dict[str, str]:
    """Each way of running an action, whose error or result is this rank's number."""

    def action() -> str:
        if ranks.rank() == failing:
            raise error
        return f"of rank {ranks.rank()}"

    found = {name: outcome(lambda: way(action)) for name, way in WAYS.items()}  # noqa: B023
    return found | {"the next collective": str(ranks.gather_objects([ranks.rank()]))}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("error", [UserError("no"), ZeroDivisionError("by 0\nand so on")], ids=repr)
def test_an_error_on_rank_0_is_raised_on_all(error: Exception) -> None:
    first, second = processes.run(2, results, 0, error)
    told = "no" if isinstance(error, UserError) else "rank 0: ZeroDivisionError: by 0"
    assert first == dict.fromkeys(WAYS, f"{type(error).__name__}: {error}") | {
        "the next collective": "[0, 1]"
    }
    assert second == dict.fromkeys(WAYS, f"UserError: {told}") | {"the next collective": "[0, 1]"}


@pytest.mark.world_size(2)
def test_results_and_an_error_on_rank_1() -> None:
    first, second = processes.run(2, results, 1, RuntimeError("here"))
    assert first == {
        "on rank 0": "of rank 0",
        "once a machine": "of rank 0",
        "first rank first": "UserError: rank 1: RuntimeError: here",
        "the next collective": "[0, 1]",
    }
    assert second == first | {"first rank first": "RuntimeError: here"}


def status_on_all() -> int:
    error = NotSavedError("full") if ranks.rank() == 1 else None
    with pytest.raises(UserError, match="full") as raised:
        ranks.raise_on_all_ranks(error)
    return raised.value.status


def flags() -> list[bool]:
    return ranks.true_on_any_rank(torch.tensor([False, ranks.rank() == 1]))


@pytest.mark.world_size(2)
def test_the_exit_status_and_flags_reach_all() -> None:
    assert processes.run(2, status_on_all) == [NOT_SAVED] * 2
    assert processes.run(2, flags) == [[False, True]] * 2


ARGUMENTS: dict[str, tuple[object, ...]] = {  # of errors that take more than a message
    "SettingError": ("loss.beta", "loss.beta: Value 'x' is no float"),
    "UnknownKeyError": ("loss.bet", ["beta", "rescale"]),
    "StorageError": ("write", "/runs", "full"),
}


def kinds_of(error: type[UserError]) -> Iterator[type[UserError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds_of(kind)


def test_every_error_can_be_sent_to_another_rank() -> None:
    for module in pkgutil.walk_packages(alignclip.__path__, "alignclip."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = [kind for kind in kinds_of(UserError) if kind.__module__.startswith("alignclip.")]
    assert ARGUMENTS.keys() < {kind.__name__ for kind in kinds}
    for kind in kinds:
        error = kind(*ARGUMENTS.get(kind.__name__, ("no",)))
        sent = pickle.loads(pickle.dumps(error))
        assert (type(sent), str(sent), vars(sent)) == (kind, str(error), vars(error))


def start_of_a_broken_folder(yaml: Path) -> str:
    config = load(yaml, ["run_name=r", "scheduler.t_warmup=1ba"])
    folder = SaveFolder(config)
    folder.latest_target = lambda: str(1 // 0)  # type: ignore[method-assign]

    def start() -> None:
        with starting_point(config, folder):
            raise AssertionError("nothing is to start from")

    return outcome(start)


@pytest.mark.world_size(2)
def test_any_error_while_a_checkpoint_is_chosen_reaches_all(tmp_path: Path) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    why = "ZeroDivisionError: integer division or modulo by zero"
    found = processes.run(2, start_of_a_broken_folder, yaml)
    assert found == [why, f"UserError: rank 0: {why}"]
