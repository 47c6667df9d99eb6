"""One checkpoint: a folder of two or three files with checksums, of which nothing is used before it is verified."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from kaun.checkpoint import encoding, files, manifest, strict_json
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.encoding import is_elsewhere
from kaun.checkpoint.hashed import Damaged, FileContent, Source, reading
from kaun.checkpoint.manifest import FileDigest, Manifest
from kaun.checkpoint.parts import Parts, Share, leaves_of, shards_of
from kaun.checkpoint.safetensors_header import Place, read_places
from kaun.errors import ResumeMismatch
from kaun.layers.core import Vars
from kaun.state import TrainState
from kaun.tree import flatten, is_array

__all__ = [
    "MANIFEST", "REPORTS", "STATE", "Damaged", "Draft", "Manifest", "OtherLeaves", "Saved", "leaves", "read",
    "read_manifest", "read_vars", "verify", "write_joined",
]  # fmt: skip

T = TypeVar("T")

STATE, REPORTS = manifest.FILES
MANIFEST = "manifest.json"
_VARS, _OPT_STATE = "vars.", "opt_state"  # the names of their leaves in the state begin with these
_RECORDS = 1 << 16  # bytes of a manifest for names and sizes of files
_IN_PARTS = "reports."  # in parts, the names of arrays of reports begin with this; no field of a state has the name


class OtherLeaves(ResumeMismatch):
    """The leaves of a checkpoint are not those of the template; the text is the list of differences.

    Attributes:
        in_opt_state: Whether only those of the optimizer's state differ.
    """

    def __init__(self, differences: encoding.Differences) -> None:
        super().__init__(differences.listing())
        self.in_opt_state: bool = all(line.startswith(_OPT_STATE) for line in differences.lines)


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: The run's step.
        state: The state.
        reports: Arrays and JSON values that reports keep, by name.
        facts: By what the run is recognized, by name.
    """

    step: int
    state: TrainState
    reports: dict[str, Any]
    facts: dict[str, Any]


class Draft:
    """A checkpoint in memory, ready to be written. The arguments may change afterwards: what can is copied.

    Args:
        step: The run's step.
        state: The state.
        reports: Arrays (which come back as NumPy's), floats, and JSON values, by name.
        facts: JSON values, by name.
        share: What this process writes of it; None: all.

    Raises:
        TypeError: If neither JSON nor a safetensors file can hold a value.
        ValueError: If they cannot hold it, or all that is not an array takes more than 16 MB.
    """

    def __init__(
        self,
        step: int,
        state: TrainState,
        reports: Mapping[str, Any],
        facts: Mapping[str, Any],
        share: Share | None = None,
    ) -> None:
        held = {name: v for name, v in reports.items() if is_array(v) or (type(v) is float and not np.isfinite(v))}
        values = {name: value for name, value in reports.items() if name not in held}
        self.step = step
        self._text = (
            f'"reports":{strict_json.dumps(values, "reports")},"facts":{strict_json.dumps(dict(facts), "facts")}'
        )
        leaves, self._in_parts = flatten(state)[0], share is not None
        if share is None:
            self._files = {STATE: FileContent(leaves)} | ({REPORTS: FileContent(held)} if held else {})
        else:
            leaves |= {_IN_PARTS + name: value for name, value in held.items()}
            self._files = {share.file: FileContent(shards_of(leaves, share))}
            self._text = f'"leaves":{strict_json.dumps(leaves_of(leaves), "leaves")},{self._text}'
        sums = sum(getattr(leaf, "nbytes", 8) for leaf in leaves.values()) >> 19  # eight digits for each 4 MiB
        if len(self._text) > strict_json.LARGEST - _RECORDS - sums:
            raise ValueError(
                f"the reports' values and the facts of a checkpoint take {len(self._text)} bytes as JSON, and at most "
                f"{strict_json.LARGEST >> 20} MB can be stored. Keep arrays instead: np.asarray(values)."
            )

    def write(self, disk: Disk, folder: Path) -> None:
        """Make the folder and its files, and wait until they are on the disk."""
        self.seal(disk, folder, self.write_files(disk, folder))

    def write_files(self, disk: Disk, folder: Path) -> dict[str, FileDigest]:
        """Make the folder, if no other process has, and the files with arrays, and wait until they are on the disk.

        Where this process writes all of them, it also writes the manifest.
        """
        try:
            disk.make_folder(folder)
        except FileExistsError:
            if not self._in_parts:
                raise
        records: dict[str, FileDigest] = {}
        with contextlib.ExitStack() as opened:
            written: list[int] = []
            for name, content in self._files.items():
                written.append(_create(disk, folder / name, opened))
                records[name] = content.write(disk, written[-1])
            if not self._in_parts:
                written.append(_create(disk, folder / MANIFEST, opened))
                disk.write(written[-1], memoryview(manifest.sealed(self.step, records, self._text)))
            # The small manifest first: what the file system then notes down for it holds for the large file too. On
            # ext4 a checkpoint of 120 MB takes 66 ms in this order, and 82 ms where each file is synced when written.
            for file in reversed(written):
                disk.sync(file)
        return records

    def seal(self, disk: Disk, folder: Path, records: Mapping[str, FileDigest]) -> None:
        """Write the manifest of parts, and wait until the folder is on the disk. Its files must be there.

        Args:
            disk: The disk.
            folder: The folder.
            records: What ``write_files`` returned, in all processes together.

        Raises:
            ValueError: If the shards in the parts are not all of a leaf: the processes have different trees.
        """
        if self._in_parts:
            raw = manifest.sealed(self.step, records, self._text, parts=True)
            try:
                Parts(disk, folder, manifest.parse(raw))
            except Damaged as err:
                raise ValueError(
                    f"the processes save different leaves: {err}. Give all of them the same trainer, and the same "
                    "reports in the same order; the ready-made ones write in process 0 alone."
                ) from None
            with contextlib.ExitStack() as opened:
                file = _create(disk, folder / MANIFEST, opened)
                disk.write(file, memoryview(raw))
                disk.sync(file)
        disk.sync_folder(folder)


def _create(disk: Disk, path: Path, opened: contextlib.ExitStack) -> int:
    """Make a file and open it for writing, until a block ends."""
    file = disk.create(path)
    opened.callback(disk.close, file)
    return file


def verify(disk: Disk, folder: Path, step: int, index: int = 0, count: int = 1) -> Manifest:
    """Read every byte of a checkpoint, check it, and return the manifest.

    Args:
        disk: The disk.
        folder: The checkpoint.
        step: Its step.
        index: Of several processes that verify it together, the number of this one, which reads its share of the files.
        count: How many there are.

    Raises:
        Damaged: If a byte is not as it was written.
        ResumeMismatch: If a newer version of kaun wrote the checkpoint.
    """
    about = read_manifest(disk, folder, step)
    for name, record in sorted(about.files.items())[index::count]:
        with reading(name), Source(disk, folder / name, record) as source:
            source.finish()
    return about


def leaves(disk: Disk, folder: Path, step: int) -> tuple[Manifest, dict[str, list[Place]]]:
    """Verify a checkpoint, and return its manifest and the arrays in each of its files."""
    if (about := read_manifest(disk, folder, step)).leaves is not None:
        verify(disk, folder, step)
        return about, {f"{len(about.files)} parts": list(about.leaves.values())}
    found: dict[str, list[Place]] = {}
    for name, record in about.files.items():
        with reading(name), Source(disk, folder / name, record) as source:
            found[name] = read_places(source.take, source.left)
            source.finish()
    return about, found


def read_manifest(disk: Disk, folder: Path, step: int) -> Manifest:
    """Verify and return the manifest of a checkpoint; its other files are not read.

    Raises:
        Damaged: If a byte of it is not as it was written.
        ResumeMismatch: If a newer version of kaun wrote the checkpoint.
    """
    if folder.is_symlink():
        raise Damaged("it is a link and not a folder")
    with reading(MANIFEST):
        return manifest.read(disk, folder / MANIFEST, step)


def read(disk: Disk, folder: Path, step: int, like: TrainState, *, verified: bool = False) -> Saved:
    """Verify and return a checkpoint in the structure of ``like``; see ``checkpoint.load`` for what a template is.

    Args:
        disk: The disk.
        folder: The checkpoint.
        step: Its step.
        like: The template.
        verified: Whether parts were verified already, by several processes together.

    Raises:
        Damaged: If a byte is not as it was written; nothing of the checkpoint was used.
        OtherLeaves: If the leaves, shapes and dtypes are not those of ``like``.
    """
    about = read_manifest(disk, folder, step)
    reports = dict(about.reports)
    if about.leaves is not None:
        parts = _opened(disk, folder, step, verified=verified)
        state, leaves = _tree_of(parts, like), flatten(like)[0]
        for name in about.leaves:
            if name.startswith(_IN_PARTS):
                reports[name.removeprefix(_IN_PARTS)] = _report_array(parts, name, leaves)
        return Saved(step, state, reports, about.facts)
    state = _read_tree(disk, folder, about, like)
    if REPORTS in about.files:
        with reading(REPORTS):
            reports |= _leaves(disk, folder / REPORTS, about.files[REPORTS])[0]
    return Saved(step, state, reports, about.facts)


def read_vars(disk: Disk, folder: Path, step: int, like: Vars, *, verified: bool = False) -> Vars:
    """Verify a checkpoint, and return its variables alone; no array is made of the other leaves.

    Raises:
        Damaged: If a byte of the manifest or of the state's file is not as it was written.
        OtherLeaves: If the leaves, shapes and dtypes of the variables are not those of ``like``.
    """
    about = read_manifest(disk, folder, step)
    if about.leaves is not None:
        return _tree_of(_opened(disk, folder, step, verified=verified), like, _VARS)
    return _read_tree(disk, folder, about, like, _VARS)


def write_joined(disk: Disk, folder: Path, step: int, target: Path) -> None:
    """Verify a checkpoint, and write its state as one file, the bytes that ``checkpoint.save`` would write.

    Raises:
        Damaged: If a byte is not as it was written.
    """
    if read_manifest(disk, folder, step).leaves is None:
        verify(disk, folder, step)
        files.copy("join", target, folder / STATE)
        return
    parts = _opened(disk, folder, step)
    leaves = [place for place in parts.leaves.values() if not place.name.startswith(_IN_PARTS)]
    files.write_arrays("join", target, leaves, parts.whole)


def _opened(disk: Disk, folder: Path, step: int, *, verified: bool = False) -> Parts:
    about = read_manifest(disk, folder, step) if verified else verify(disk, folder, step)
    return Parts(disk, folder, about)


def _tree_of(parts: Parts, like: T, start: str = "") -> T:
    """The leaves in parts whose names have this start, in the structure of a template and on its devices."""
    leaves, structure = flatten(like)
    wanted = {start + name: leaf for name, leaf in leaves.items()}
    encoding.check_template(wanted)
    places = [
        place for name, place in parts.leaves.items() if name.startswith(start) and not name.startswith(_IN_PARTS)
    ]
    with reading(MANIFEST):
        differences = encoding.compare(places, wanted)
    if differences.lines:
        raise OtherLeaves(differences)
    return jax.tree.unflatten(structure, [parts.restore(name, leaf) for name, leaf in wanted.items()])


def _report_array(parts: Parts, name: str, leaves: Mapping[str, Any]) -> Any:
    """An array that a report kept; it lies as the state's leaf of its name where that is spread over processes."""
    place, rest = parts.leaves[name], name
    while rest:
        rest = rest.partition("/")[2]
        like = leaves.get(rest)
        if (
            isinstance(like, jax.Array)
            and (like.shape, like.dtype) == (place.shape, place.dtype)
            and is_elsewhere(like)
        ):
            return parts.restore(name, like)
    with reading(MANIFEST):
        encoding.compare([place], None)
    return encoding.decode(place, parts.whole(name))


def _read_tree(disk: Disk, folder: Path, about: Manifest, like: T, start: str = "") -> T:
    """The leaves of the state whose names have this start, in the structure of a template."""
    leaves, structure = flatten(like)
    wanted = {start + name: leaf for name, leaf in leaves.items()}
    encoding.check_template(wanted)
    with reading(STATE):
        found, differences = _leaves(disk, folder / STATE, about.files[STATE], wanted, start)
    if differences.lines:
        raise OtherLeaves(differences)
    return jax.tree.unflatten(
        structure, [encoding.restore(name, found.pop(name), leaf) for name, leaf in wanted.items()]
    )


def _leaves(
    disk: Disk, path: Path, record: FileDigest, wanted: Mapping[str, Any] | None = None, start: str = ""
) -> tuple[dict[str, Any], encoding.Differences]:
    """Verify a file, and return its leaves whose names have this start, and how they differ from the template."""
    with Source(disk, path, record) as source:
        arrays, differences = files.read_arrays(
            source.take, source.left, wanted, start=start, later=source.take_later, skip=source.skip
        )
        source.finish()  # before anything is used, and also where leaves differ: the header may be what is damaged
    return {place.name: encoding.decode(place, array) for place, array in arrays}, differences
