"""Command lines: flags that are mistyped are one line; ``prog config.yaml key.sub=value …``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from alignclip.errors import BAD_INPUT, nearest
from alignclip.runtime.threads import set_thread_defaults

DRY_RUN = "--dry-run"
_KINDS = {"int": "whole number", "float": "number"}


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line that names the nearest flag or value.

    Args:
        prog: how the command is called.
        description: what the command does.
        examples: shown below the flags.
    """

    def __init__(self, prog: str, description: str | None, examples: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=examples)
        if examples:
            self.formatter_class = argparse.RawDescriptionHelpFormatter

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse the arguments; a mistyped flag is told before flags that are missing.

        Raises:
            SystemExit: with status 2, the arguments are wrong; or with 0, ``--help`` was shown.
        """
        for word in sys.argv[1:] if args is None else args:
            flag = word.partition("=")[0]
            known = self._option_string_actions
            if flag == "--":
                break
            if flag.startswith("--") and not any(one.startswith(flag) for one in known):
                shown = [one for one in known if known[one].help != argparse.SUPPRESS]
                self.error(f"{flag}: {nearest(flag, [*shown])}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and end the command.

        Raises:
            SystemExit: always, with status 2.
        """
        message = message.removeprefix("argument ")
        if found := re.match(r"(.*): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            choices = [choice.strip("' ") for choice in found[3].split(",")]
            message = f"{found[1]} {found[2]}: {nearest(found[2], choices)}"
        elif found := re.match(r"(.*): invalid (int|float) value: '(.*)'", message):
            message = f"{found[1]} {found[3]}: this is no {_KINDS[found[2]]}"
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT)


@dataclass(frozen=True)
class CommandArguments:
    """The arguments of a command that reads a YAML file.

    Attributes:
        config: path or URL of the YAML file.
        overrides: ``key.sub=value``, also those that began with dashes.
        dry_run: steps to measure in a dry run; None where the command shall do its work.
    """

    config: str
    overrides: list[str]
    dry_run: int | None = None


def read_arguments(
    arguments: Sequence[str], prog: str, description: str, examples: str, has_dry_run: bool = False
) -> CommandArguments:
    """Read the arguments of a command.

    Args:
        arguments: of the command line.
        prog: how the command is called.
        description: what the command does.
        examples: shown below the flags.
        has_dry_run: whether the command takes ``--dry-run``.

    Raises:
        SystemExit: with status 2, the arguments are wrong; or with 0, ``--help`` was shown.
    """
    set_thread_defaults()  # before torch is imported
    parser, words = Parser(prog, description, examples), list(arguments)
    parser.allow_abbrev = False  # what begins with dashes may be an override
    parser.add_argument(
        "config", help="YAML file, or its URL; docs/configuration.md says what it holds"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="settings that replace the file's",
    )
    if has_dry_run:
        parser.add_argument(
            DRY_RUN,
            type=_steps,
            metavar="STEPS",
            help="check everything, print the resolved configuration, sizes, memory and FLOPs, and "
            "train nothing; --dry-run=3 measures 3 steps besides, and says how long the run will "
            "take",
        )
        # argparse would take the word behind the flag for its value
        words = [f"{DRY_RUN}=0" if one == DRY_RUN else one for one in arguments]
    options, dashed = parser.parse_known_args(words)
    overrides = [*options.overrides, *dashed]
    if any(re.match(r"-+dry", one) for one in dashed):
        parser.error(f"write {DRY_RUN} or {DRY_RUN}=3; composer pretrain.py takes it")
    alone = filter(str.isdecimal, (options.config, *overrides))
    if DRY_RUN in arguments and (steps := next(alone, "")):
        parser.error(f"{DRY_RUN} {steps}: write {DRY_RUN}={steps}")
    return CommandArguments(options.config, overrides, options.dry_run if has_dry_run else None)


def _steps(text: str) -> int:
    """Read the number of steps that a dry run measures.

    Raises:
        argparse.ArgumentTypeError: this is no such number.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of steps; write {DRY_RUN}=3")
    return int(text)
