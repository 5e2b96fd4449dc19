"""The arguments of a command ``prog config.yaml key.sub=value …``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from alignclip.runtime.threads import set_thread_defaults


def read_arguments(
    arguments: Sequence[str], prog: str, description: str, examples: str
) -> tuple[str, list[str]]:
    """Return the YAML file and the overrides, also overrides that begin with dashes."""
    set_thread_defaults()  # before torch is imported
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, or its URL; README.md says what it holds")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="settings that replace the file's",
    )
    options, dashed = parser.parse_known_args(arguments)
    return options.config, [*options.overrides, *dashed]
