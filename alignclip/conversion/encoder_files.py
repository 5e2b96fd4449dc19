"""The files of a sentence encoder, looked at before sentence-transformers reads them.

sentence-transformers imports the classes that a folder's ``modules.json`` names, from the folder
itself, too: such a folder runs its own code. And it reads weights that are a pickle by torch's
restricted unpickler, which has a hole up to torch 2.9.1 (GHSA-63cw-57p8-fm3p).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from alignclip.checked_json import has_type, parse_json
from alignclip.errors import UserError, one_line

MODULES = "modules.json"
OWN_CLASSES = "sentence_transformers."  # where the names of its own classes begin
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
INDEX_OF_PARTS = ".index.json"  # ends the file that names a model's files of weights


class _Module(TypedDict):
    type: str


def check_encoder_folder(folder: Path) -> None:
    """Refuse a folder whose files would run code.

    Raises:
        UserError: it names classes of its own, or its weights are a pickle.
    """
    check_encoder_weights(str(folder), (str(path.relative_to(folder)) for path in _files(folder)))
    if not (path := folder / MODULES).is_file():
        return
    try:
        modules = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' is no sentence encoder: {MODULES}: {one_line(error)}"
        ) from None
    if not has_type(modules, list[_Module]):
        raise UserError(f"'{folder}' is no sentence encoder: {MODULES} is no list of modules")
    for module in modules:
        if not module["type"].startswith(OWN_CLASSES):
            raise UserError(
                f"'{folder}' is refused: its {MODULES} names the class {module['type'][:80]}, "
                "which would run its own code; use an encoder of sentence-transformers' own classes"
            )


def check_encoder_weights(place: str, names: Iterable[str]) -> None:
    """Refuse an encoder with weights that are a pickle, and no safetensors beside them.

    Args:
        place: of the encoder, for the message.
        names: of its files, relative to its folder.

    Raises:
        UserError: names the first such file.
    """
    files = {Path(name) for name in names}
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    for file in sorted(files):
        if _is_for_openvino(file, files):
            continue
        if file.suffix in PICKLED and file.parent not in safe and len(file.parts) <= 2:
            raise UserError(
                f"'{place}' is refused: {file} is a pickle, which could run code; if you trust the "
                "encoder, load it by sentence-transformers and save it again: that writes "
                "safetensors"
            )


def _is_for_openvino(file: Path, files: set[Path]) -> bool:
    """Say whether weights are numbers alone that OpenVINO reads, as most encoders of the hub have.

    PyTorch's readers take files of fixed names, and those that an index beside them names.
    """
    is_named = any(one.parent == file.parent and one.name.endswith(INDEX_OF_PARTS) for one in files)
    is_its_own = file.match("openvino/openvino_*.bin") and file.with_suffix(".xml") in files
    return is_its_own and not is_named


def _files(folder: Path) -> Iterable[Path]:
    return (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
