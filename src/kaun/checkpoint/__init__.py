"""Checkpoints: trees in single files, and directories of runs that can be killed at any moment."""

from kaun.checkpoint.directory import Directory as Directory
from kaun.checkpoint.files import load as load
from kaun.checkpoint.files import save as save
from kaun.errors import ResumeMismatch as ResumeMismatch
