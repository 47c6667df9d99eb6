"""Implicit random keys: a scope returns keys in order; each is a function of the scope's key and its position."""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import module_names, public, shown
from kaun._jax import is_traced, trace_of
from kaun._messages import Block, UserBlock, contextmanager

__all__ = ["next_key", "scope"]


class _Scope:
    """A key and a counter.

    ``trace`` is the JAX trace in which the scope was opened, None outside of all traces; ``unscoped`` whether the key
    was drawn outside of all scopes, so that the keys of this one count as drawn there too.
    """

    __slots__ = ("counter", "key", "newest", "trace", "unscoped")

    def __init__(self, key: jax.Array, counter: Iterator[Any] | None = None) -> None:
        self.key = key
        # The next() of a count is atomic, so two threads never get one key.
        self.counter: Iterator[Any] = itertools.count() if counter is None else counter
        self.newest = -1
        self.trace = _innermost_trace()
        self.unscoped = False


def _innermost_trace() -> Any:
    """Return the innermost trace that records operations into a program, None outside of any.

    grad and vmap alone record nothing, so drawing under them is as good as outside.
    """
    return trace_of(jnp.zeros((), jnp.uint32))


_current: ContextVar[_Scope | None] = ContextVar("kaun_rng_scope", default=None)
_process_scope: _Scope | None = None
_process_lock = threading.Lock()
_derived: set[bytes] = set()  # keys that ``remember_unscoped`` took
_MOST_DERIVED = 100_000
if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = module_names(__name__)


@public
def scope(seed_or_key: int | jax.Array) -> Block[None]:
    """Open a scope in which ``next_key`` (and so ``Layer.init``, ``Trainer.init``, ``Data.shuffle``) is reproducible.

    Scopes nest: an inner scope neither reads nor advances the outer one. Each thread has its own scopes. Do not
    ``yield`` inside a scope: until the generator is resumed, the code that consumes it would draw from its scope. A
    call without ``with`` changes nothing, and issues a warning.

    Args:
        seed_or_key: An integer seed (0 to 2**32 - 1), a typed key (``jax.random.key``) or a legacy uint32 key
            (``jax.random.PRNGKey``).

    Yields:
        None. It also decorates functions.

    Raises:
        TypeError: If it is neither a seed nor a key, when it is opened; if it decorates a generator or a coroutine.
        ValueError, RuntimeError: If the seed is outside 0 to 2**32 - 1, likewise; if it is entered twice.

    Examples:
        >>> from kaun import rng
        >>> with rng.scope(42):
        ...     a = rng.next_key()
        >>> with rng.scope(42):
        ...     b = rng.next_key()
        >>> a == b
        Array(True, dtype=bool)
    """
    call = lambda: f"rng.scope({seed_or_key if isinstance(seed_or_key, int) else 'key'})"
    frame = sys._getframe(2)  # the frame between is that of `public`  # pyright: ignore[reportPrivateUsage]
    return UserBlock(functools.partial(_open, seed_or_key), call, frame)


def _open(seed_or_key: Any) -> Generator[None]:
    opened = _Scope(_as_key(seed_or_key))
    opened.unscoped = not isinstance(seed_or_key, int) and _is_unscoped(opened)
    token = _current.set(opened)
    try:
        yield
    finally:
        _current.reset(token)


@public
def next_key() -> jax.Array:
    """Return the next key of the innermost scope.

    Outside of all scopes keys come from a process-wide generator seeded by the operating system, which is convenient
    but not reproducible. Inside kaun's compiled steps a scope is always open, on the step's own key.

    Returns:
        A typed JAX key of shape ().

    Raises:
        RuntimeError: If it is called inside a function compiled by the user's own ``jax.jit`` (or ``scan``, ``cond``,
            ``checkpoint``) while the scope was opened outside: the key would be a constant of the compiled program.

    Examples:
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
    # The second comparison is for a scope on a vmapped key, which carries vmap's trace; that records nothing.
    if trace_of(key) is not current.trace and _innermost_trace() is not current.trace:
        raise RuntimeError(
            "rng.next_key() was called inside a function that JAX is compiling (jit, scan, cond, checkpoint), but its "
            "scope was opened outside: the key would be frozen into the compiled program and every call would draw "
            "the same numbers. Draw the key outside and pass it in,\n"
            "    compiled(rng.next_key(), x)\n"
            "or open a scope inside, on a key that is an argument:\n"
            "    with rng.scope(key): ...\n"
            "In the place of jax.checkpoint around a layer write layers.remat(layer)."
        )
    if current.unscoped:
        remember_unscoped(key)
    return key


def carry_scope() -> Callable[[], AbstractContextManager[None]]:
    """Return a function that opens the current scope inside a function which JAX traces and then runs in this place.

    Its keys are those that would be drawn here, in the same order. It is meant for ``jax.checkpoint``, which traces a
    function at each call and runs the program once; the keys of a function that runs more often would repeat.

    Examples:
        >>> import jax
        >>> from kaun import rng
        >>> def drawn():
        ...     scope = rng.carry_scope()
        ...     def noise():
        ...         with scope():
        ...             return jax.random.normal(rng.next_key())
        ...     return jax.checkpoint(noise)() - noise()
        >>> with rng.scope(0):
        ...     a = drawn()
        >>> with rng.scope(0):
        ...     b = jax.random.normal(rng.next_key()) - jax.random.normal(rng.next_key())
        >>> a == b
        Array(True, dtype=bool)
    """
    outer = _current.get() or _process_wide()
    readable = _innermost_trace() is outer.trace

    @contextmanager
    def inside() -> Generator[None, None, None]:
        token = _current.set(_Scope(outer.key, outer.counter) if readable else outer)
        try:
            yield
        finally:
            _current.reset(token)

    return inside


def loop_scope() -> Callable[[jax.Array], AbstractContextManager[None]]:
    """Return a function that opens a scope for iteration i of a loop whose body JAX traces once, in that body.

    The keys of an iteration are a function of i and of one key of the current scope. That key is drawn when the body
    first asks for one, so that a body without random numbers draws none.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from kaun import rng
        >>> def drawn():
        ...     scope = rng.loop_scope()
        ...     def noise(i):
        ...         with scope(i):
        ...             return jax.random.normal(rng.next_key())
        ...     return jax.lax.map(noise, jnp.arange(3))
        >>> with rng.scope(0):
        ...     first, second = drawn(), drawn()
        >>> len(set(first.tolist() + second.tolist()))
        6
    """
    outer = _current.get() or _process_wide()
    readable = _innermost_trace() is outer.trace
    index: list[int] = []

    @contextmanager
    def inside(iteration: jax.Array) -> Generator[None, None, None]:
        token = _current.set(_LoopScope(outer, iteration, index) if readable else outer)
        try:
            yield
        finally:
            _current.reset(token)

    return inside


class _LoopScope(_Scope):
    """A scope for one iteration of a loop. ``index`` holds the count of the outer scope's key once it is drawn."""

    __slots__ = ("_index", "_iteration", "_outer")

    def __init__(self, outer: _Scope, iteration: jax.Array, index: list[int]) -> None:
        self._outer, self._iteration, self._index = outer, iteration, index
        self.counter, self.newest, self.trace = itertools.count(), -1, _innermost_trace()
        self.unscoped = False

    @property
    def key(self) -> jax.Array:
        """The key of the iteration, from a key of the outer scope."""
        if not self._index:
            self._outer.newest = next(self._outer.counter)
            self._index.append(self._outer.newest)
        return jax.random.fold_in(jax.random.fold_in(self._outer.key, self._index[0]), self._iteration)


class LentScope:
    """The current scope, lent to a function that JAX compiles: its key and the count of its next key are arguments.

    Attributes:
        key: The scope's key.
        first: The count of the first key that the function draws.
        scoped: Whether it is a scope, and not the keys outside of all, or a scope on one of these.

    Examples:
        >>> import jax
        >>> from kaun import rng
        >>> def two():
        ...     return jax.random.key_data(rng.next_key()), jax.random.key_data(rng.next_key())
        >>> with rng.scope(0):
        ...     lent = rng.LentScope()
        ...     found = jax.jit(lent.inside(two))(lent.key, lent.first)
        ...     lent.give_back()
        ...     third = rng.next_key()
        >>> with rng.scope(0):
        ...     expected, same = two(), rng.next_key() == third
        >>> bool(same), all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found, expected)))
        (True, True)
    """

    def __init__(self) -> None:
        self._outer = _current.get() or _process_wide()
        self.scoped: bool = _current.get() is not None and not self._outer.unscoped
        self._drawn = 0
        self.key: jax.Array = self._outer.key
        self.first: int = next(self._outer.counter)
        self._outer.newest = self.first

    def inside(self, function: Callable[[], Any]) -> Callable[[jax.Array, Any], Any]:
        """Return a function of key and first count that runs ``function`` in a scope whose keys begin there."""

        def run(key: jax.Array, first: Any) -> Any:
            counter = itertools.count()
            token = _current.set(_Scope(key, (first + np.uint32(i) for i in counter)))
            try:
                return function()
            finally:
                _current.reset(token)
                self._drawn = next(counter)

        return run

    def give_back(self) -> None:
        """Move the lent scope on by the keys that the function drew when it was last run or traced; at least one."""
        for _ in range(self._drawn - 1):
            self._outer.newest = next(self._outer.counter)
        if self._outer.unscoped:
            counts = jnp.arange(self.first, self.first + max(self._drawn, 1))
            remember_unscoped(jax.vmap(jax.random.fold_in, (None, 0))(self.key, counts))


def counts() -> dict[str, tuple[str, int]]:
    """How many keys were drawn from the innermost scope, and outside of all, with the key of each."""
    scopes = {"outside of any rng.scope": _process_scope, "in the rng.scope around fit": _current.get()}
    data = lambda key: str(jax.random.key_data(key))
    return {where: (data(s.key), s.newest) if s is not None else ("", -1) for where, s in scopes.items()}


def unscoped(key: jax.Array) -> bool:
    """Whether ``next_key`` drew this key outside of all scopes in this process, so that another run cannot draw it.

    A scope on such a key, ``rng.scope(rng.next_key())``, counts as none. The keys drawn are not stored: they are a
    function of the process-wide key and a count, and are computed again. Those of a scope on one of them, and of the
    members of an ensemble, are stored by ``remember_unscoped``.

    Args:
        key: A typed key, or an array of them, of which one is enough.

    Examples:
        >>> from kaun import rng
        >>> with rng.scope(0):
        ...     key = rng.next_key()
        >>> with rng.scope(rng.next_key()):
        ...     inside = rng.next_key()
        >>> rng.unscoped(key), rng.unscoped(rng.next_key()), rng.unscoped(inside)
        (False, True, True)
    """
    wanted = np.asarray(tree.readable(jax.random.key_data(key)))  # in all processes, where it lies on all of them
    if not _derived.isdisjoint(_bytes_of(wanted)):
        return True
    if _process_scope is None:
        return False
    # A power of two, so that few programs are compiled; above the newest count, which one of two threads writes late.
    count = 1 << (_process_scope.newest + 64).bit_length()
    return bool(_is_among(_process_scope.key, jnp.arange(count), wanted))


def _is_unscoped(opened: _Scope) -> bool:
    """Whether the key of a scope was drawn outside of all scopes; inside of what JAX traces it is not looked at."""
    drawn = _process_scope is not None or _derived
    return bool(drawn) and opened.trace is None and not is_traced(opened.key) and unscoped(opened.key)


def remember_unscoped(keys: jax.Array) -> None:
    """Let ``unscoped`` find keys, at most 100,000, made of one drawn outside of all scopes; in others do nothing.

    Args:
        keys: An array of typed keys.

    Examples:
        >>> import jax
        >>> from kaun import rng
        >>> keys = jax.random.split(rng.next_key(), 2)
        >>> rng.remember_unscoped(keys)
        >>> rng.unscoped(keys), rng.unscoped(keys[1])
        (True, True)
    """
    current = _current.get()
    if (current is None or current.unscoped) and not is_traced(keys) and len(_derived) < _MOST_DERIVED:
        _derived.update(_bytes_of(np.asarray(jax.random.key_data(keys))))


def _bytes_of(data: np.ndarray[Any, Any]) -> list[bytes]:
    """Return the bytes of each key."""
    return [row.tobytes() for row in data.reshape(-1, data.shape[-1])]


@jax.jit
def _is_among(key: jax.Array, counts: jax.Array, wanted: jax.Array) -> jax.Array:
    made = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, counts))
    if made.shape[1:] != wanted.shape:
        return jnp.zeros((), bool)  # the key has another implementation
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
    received = f"{dtype}{list(shape)}" if dtype is not None else shown(seed_or_key)
    raise TypeError(
        f"rng.scope expected an integer seed or a single JAX key, received {received}. "
        "Use rng.scope(42) or rng.scope(jax.random.key(42))."
    )


def _from_seed(seed: int) -> jax.Array:
    # Without x64 JAX keeps only 32 bits: 2**32 would be the same seed as 0, but not with x64.
    if not 0 <= seed < 2**32:
        raise ValueError(f"rng.scope expected a seed from 0 to 2**32 - 1, received {seed}. Use seed % 2**32.")
    return jax.random.key(seed)


def _process_wide() -> _Scope:
    global _process_scope
    with _process_lock:
        if _process_scope is None:
            # Computed outside of whatever is being traced: a traced value must not outlive its trace.
            with jax.ensure_compile_time_eval():
                key = jax.random.fold_in(jax.random.key(secrets.randbits(31)), secrets.randbits(32))
                _process_scope = _Scope(key)
        return _process_scope
