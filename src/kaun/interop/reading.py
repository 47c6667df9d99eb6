"""Files of a folder of the Hugging Face hub: which of them holds the weights, and what each is read as."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from kaun._messages import quoted
from kaun.checkpoint import UnreadDtype, read_index, read_safetensors
from kaun.interop.rules import Array

__all__ = ["file_of", "read_file", "shard", "shards"]

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def file_of(folder: Path) -> Path:
    """The weights file or the index in a folder."""
    both = [folder / _INDEX, folder / "model.safetensors"]
    present = [file for file in both if file.is_file()]
    # Other names of the hub: diffusion_pytorch_model, adapter_model, model.fp16.
    found = sorted(file for file in folder.iterdir() if file.is_file())
    indexes = [file for file in found if file.name.endswith(_INDEX.removeprefix("model"))]
    single = [file for file in found if file.name.endswith(".safetensors") and not _SHARD.search(file.name)]
    for named in (present, [*indexes, *single]):
        if len(named) == 1:
            return named[0]
    if present:
        raise ValueError(
            f"safetensors.load: {str(folder)!r} has {both[1].name!r} and {_INDEX!r}. Pass the one to read, "
            f"load({str(both[1])!r})."
        )
    names = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
        f"safetensors.load: {str(folder)!r} has neither {both[1].name!r} nor {_INDEX!r}, only {names[:20]}. Pass "
        "the file itself, load('folder/name.safetensors')."
    )


def shard(index: Path, name: str) -> Path:
    """The file of this name in the folder of an index."""
    file = index.parent / name
    if not file.is_file():
        raise FileNotFoundError(
            f"safetensors.load: {str(index)!r} names {quoted(name)}, which is not a file in its folder. Download the "
            "folder again: a part of the weights is missing."
        )
    return file


def shards(index: Path) -> dict[str, set[str]]:
    """The files of an index, and the names of the arrays that each must have."""
    files: dict[str, set[str]] = {}
    try:
        found = read_index(index).get("weight_map")
    except ValueError as err:
        raise _damaged(index, str(err)) from err
    if not isinstance(found, dict):
        raise _damaged(index, f"'weight_map' is not a JSON object but {type(found).__name__}")
    for name, file in cast("dict[str, Any]", found).items():
        # The name comes from a downloaded file: as a path it could point to any file.
        if (
            not isinstance(file, str)
            or file in ("", ".", "..")
            or any(mark in file for mark in "/\\:\0")
            or len(file) > 255
        ):
            raise ValueError(
                f"safetensors.load: {str(index)!r} has {quoted(name)} in {quoted(file)}, which is not the name of a "
                "file in its folder. Move the file there, and write its name into the index."
            )
        files.setdefault(file, set()).add(name)
    return files


def read_file(file: Path) -> dict[str, Array]:
    """All arrays of a file by name."""
    with file.open("rb") as opened:
        if opened.peek(4).startswith((b"PK\3\4", b"\x80")):
            _refuse_pickle(file, opened.peek(8)[:8])
        try:
            return read_safetensors(opened)
        except UnreadDtype as err:
            raise ValueError(
                f"safetensors.load: {str(file)!r} cannot be read: {err}. Convert those arrays with the program that "
                "wrote them, to bfloat16 for example."
            ) from err
        except ValueError as err:
            raise _damaged(file, str(err)) from err


def _refuse_pickle(file: Path, first: bytes) -> None:
    # A header of a safetensors file may begin with the same bytes, which are its length.
    if int.from_bytes(first, "little") > file.stat().st_size:
        raise ValueError(
            f"safetensors.load: {str(file)!r} is not a safetensors file but seems to be a pickle, as torch.save writes "
            "it. Reading a pickle can run any code, so kaun never does. If you trust it, convert it with torch: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )


def _damaged(file: Path, what: str) -> ValueError:
    kind = "index" if file.name.endswith(".json") else "file"
    return ValueError(f"safetensors.load: {str(file)!r} is damaged or not a safetensors {kind}: {what}.")
