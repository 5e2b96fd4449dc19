"""Command lines: flags that are mistyped are one line; ``prog config.yaml key.sub=value …``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from alignclip.errors import BAD_INPUT, nearest
from alignclip.runtime.threads import set_thread_defaults

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


def read_arguments(
    arguments: Sequence[str], prog: str, description: str, examples: str
) -> tuple[str, list[str]]:
    """Return the YAML file and the overrides, also overrides that begin with dashes."""
    set_thread_defaults()  # before torch is imported
    parser = Parser(prog, description, examples)
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
    options, dashed = parser.parse_known_args(arguments)
    return options.config, [*options.overrides, *dashed]
