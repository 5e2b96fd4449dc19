"""The modules of all commands, those with a YAML first."""

from __future__ import annotations

YAML_COMMANDS = ("alignclip.training.command", "alignclip.evaluation.command")
OPTION_COMMANDS = (
    "alignclip.search",
    "alignclip.quickstart.__main__",
    "alignclip.conversion.cc12m",
    "alignclip.conversion.classification",
    "alignclip.conversion.retrieval",
    "alignclip.weights.export_command",
    "alignclip.verification.command",
)
COMMANDS = (*YAML_COMMANDS, *OPTION_COMMANDS)
