"""Implicit randomness: a scope hands out keys in order, and every key is a function of (scope's key, position)."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from kaun._jax import is_traced, trace_of

__all__ = ["next_key", "scope"]


class _Scope:
    """A key and a counter. ``trace`` is the JAX trace in which the scope was opened, None outside of any."""

    __slots__ = ("counter", "key", "newest", "trace")

    def __init__(self, key: jax.Array) -> None:
        self.key = key
        self.counter = itertools.count()  # its next() is atomic, so two threads never get one key
        self.newest = 0
        self.trace = _innermost_trace()


def _innermost_trace() -> Any:
    """Return the innermost trace that records operations into a program, None outside of any.

    grad and vmap alone record nothing, so drawing under them is as good as outside.
    """
    return trace_of(jnp.zeros((), jnp.uint32))


_current: ContextVar[_Scope | None] = ContextVar("kaun_rng_scope", default=None)
_process_scope: _Scope | None = None
_process_lock = threading.Lock()


@contextlib.contextmanager
def scope(seed_or_key: int | jax.Array) -> Generator[None, None, None]:
    """A region in which ``next_key`` (and so ``Layer.init``, ``Trainer.init``, ``Data.shuffle``) is reproducible.

    Arguments:
        seed_or_key: an integer seed (0 to 2**32 - 1), a typed key (``jax.random.key``) or a legacy uint32 key
            (``jax.random.PRNGKey``).

    Scopes nest: an inner scope neither reads nor moves the outer one. Each thread has its own. Do not ``yield`` inside
    a scope: until the generator goes on, the code that consumes it would draw from the generator's scope.

    Raises:
        TypeError: for anything that is neither a seed nor a key.
        ValueError: for a seed outside of 0 to 2**32 - 1.

    >>> from kaun import rng
    >>> with rng.scope(42):
    ...     a = rng.next_key()
    >>> with rng.scope(42):
    ...     b = rng.next_key()
    >>> a == b
    Array(True, dtype=bool)
    """
    token = _current.set(_Scope(_as_key(seed_or_key)))
    try:
        yield
    finally:
        _current.reset(token)


def next_key() -> jax.Array:
    """The next key of the innermost scope, a typed JAX key of shape ().

    Outside of any scope keys come from a process-wide generator seeded by the operating system: convenient, not
    reproducible. Inside kaun's compiled steps a scope is always open, on the step's own key.

    Raises:
        RuntimeError: inside a function compiled by the user's own ``jax.jit`` (or ``scan``, ``cond``, ``checkpoint``)
            when the scope was opened outside of it: the key would be a constant of the compiled program.

    >>> import jax
    >>> from kaun import rng
    >>> with rng.scope(0):
    ...     noise = jax.random.normal(rng.next_key(), (3,))
    >>> noise.shape
    (3,)
    """
    current = _current.get() or _process_wide()
    current.newest = index = next(current.counter)
    key = jax.random.fold_in(current.key, index)
    # The second look is for a scope on a vmapped key: such a key carries vmap's trace, which records nothing.
    if trace_of(key) is not current.trace and _innermost_trace() is not current.trace:
        raise RuntimeError(
            "rng.next_key() was called inside a function that JAX is compiling (jit, scan, cond, checkpoint), but its "
            "scope was opened outside: the key would be frozen into the compiled program and every call would draw "
            "the same numbers. Draw the key outside and pass it in,\n"
            "    compiled(rng.next_key(), x)\n"
            "or open a scope inside, on a key that is an argument:\n"
            "    with rng.scope(key): ..."
        )
    return key


def unscoped(key: jax.Array) -> bool:
    """Whether ``next_key`` made this key outside of any scope in this process: another run would not draw it again.

    Nothing is remembered: those keys are a function of the process-wide key and a count, so they are made once more.

    >>> from kaun import rng
    >>> with rng.scope(0):
    ...     key = rng.next_key()
    >>> rng.unscoped(key), rng.unscoped(rng.next_key())
    (False, True)
    """
    if _process_scope is None:
        return False
    wanted = jax.random.key_data(key)
    # A power of two, so that few programs are compiled. Beyond the newest, because of two threads the later one may
    # have written its number first.
    count = 1 << (_process_scope.newest + 64).bit_length()
    return bool(_is_among(_process_scope.key, jnp.arange(count), wanted))


@jax.jit
def _is_among(key: jax.Array, counts: jax.Array, wanted: jax.Array) -> jax.Array:
    made = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, counts))
    if made.shape[1:] != wanted.shape:
        return jnp.zeros((), bool)  # of another kind of key
    return (made == wanted[None]).all(axis=-1).any()


def _as_key(seed_or_key: Any) -> jax.Array:
    dtype, shape = getattr(seed_or_key, "dtype", None), getattr(seed_or_key, "shape", ())
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return seed_or_key
    if dtype is not None and dtype == jnp.uint32 and len(shape) == 1:
        with contextlib.suppress(TypeError, ValueError):  # uint32, but not as long as a key: refused below
            return jax.random.wrap_key_data(jnp.asarray(seed_or_key))
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer) and shape == ():
        traced = is_traced(seed_or_key)
        return jax.random.key(seed_or_key) if traced else _from_seed(int(seed_or_key))
    if isinstance(seed_or_key, int) and not isinstance(seed_or_key, bool):
        return _from_seed(seed_or_key)
    received = f"{dtype}{list(shape)}" if dtype is not None else repr(seed_or_key)
    raise TypeError(
        f"rng.scope expected an integer seed or a single JAX key, received {received}. "
        "Use rng.scope(42) or rng.scope(jax.random.key(42))."
    )


def _from_seed(seed: int) -> jax.Array:
    # Without x64 JAX would drop all but 32 bits: 2**32 would be the seed 0, and another one with x64.
    if not 0 <= seed < 2**32:
        raise ValueError(f"rng.scope expected a seed from 0 to 2**32 - 1, received {seed}. Use seed % 2**32.")
    return jax.random.key(seed)


def _process_wide() -> _Scope:
    global _process_scope
    with _process_lock:
        if _process_scope is None:
            # Made outside of whatever is being traced, so that no traced value outlives its trace here.
            with jax.ensure_compile_time_eval():
                key = jax.random.fold_in(jax.random.key(secrets.randbits(31)), secrets.randbits(32))
                _process_scope = _Scope(key)
        return _process_scope
