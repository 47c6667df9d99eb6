"""Checkpoints: trees in single files, and directories of runs that can be killed at any moment.

``save`` and ``load`` write and read one tree. ``fit(..., checkpoints=Directory(path))`` keeps a run in a directory, and
resumes it.
"""

# files saves and loads one tree, one a checkpoint, which is a folder with checksums, parts one whose state lies on
# the devices of several processes. encoding makes arrays of leaves and puts them back on their devices, hashed writes
# and reads a file with the threads of workers, group is what processes do together. directory is what users make,
# with arguments checked and reading behind load and load_vars. A run uses store, which opening locks and tests first;
# listed says which checkpoints are kept, best which one is the best, and folders finds them by their names. Every
# file operation is in disk.

from kaun.checkpoint.best import BEST as BEST
from kaun.checkpoint.best import BRANCH as BRANCH
from kaun.checkpoint.best import FOREVER as FOREVER
from kaun.checkpoint.best import Best as Best
from kaun.checkpoint.directory import Directory as Directory
from kaun.checkpoint.disk import Disk as Disk
from kaun.checkpoint.encoding import is_elsewhere as is_elsewhere
from kaun.checkpoint.files import load as load
from kaun.checkpoint.files import save as save
from kaun.checkpoint.files import write_safetensors as write_safetensors
from kaun.checkpoint.folders import with_another_optimizer as with_another_optimizer
from kaun.checkpoint.group import group_for as group_for
from kaun.checkpoint.group import processes_with as processes_with
from kaun.checkpoint.safetensors_header import UnreadDtype as UnreadDtype
from kaun.checkpoint.safetensors_header import read_index as read_index
from kaun.checkpoint.safetensors_header import read_safetensors as read_safetensors
from kaun.checkpoint.store import Saved as Saved
from kaun.checkpoint.store import Store as Store
from kaun.errors import ResumeMismatch as ResumeMismatch

__all__ = ["Directory", "ResumeMismatch", "load", "save"]  # what users reach; the rest is for the other packages


def __dir__() -> list[str]:
    return __all__
