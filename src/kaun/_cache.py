"""JAX's compile cache on disk, with settings that keep small programs too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from kaun._calls import explained, shown

__all__ = ["cache"]


@explained("kaun.cache")
def cache(path: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a folder, from where a later process takes them instead of compiling them.

    It switches on JAX's persistent compilation cache, for all programs of this process and not for those of kaun alone,
    and programs of any size and compile time are kept. The key of a program holds its code, the versions of JAX and XLA
    and the kind of device; so a folder serves several projects, and processes at the same time. Nothing is ever removed
    from it: delete it when it has become large. A program still is traced in each process.

    Args:
        path: The folder, made where it is missing. ``~`` is the home folder.

    Raises:
        TypeError: If the path is not a string or ``os.PathLike``.
        OSError: If the folder cannot be made.

    Examples:
        >>> import tempfile, kaun
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kaun.cache(folder)  # before the first step: programs that are compiled already are not kept
    """
    folder = _folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX leaves out programs that took under a second, which are most of those of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX looks at the folder once, when it compiles for the first time


def _folder(path: Any) -> Path:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str) or not path:
        raise TypeError(
            f'cache expected the path of a folder, received {shown(path)}. Write kaun.cache("~/.cache/kaun").'
        )
    return Path(path).expanduser().absolute()
