"""What every pipeline is: iterated, immutable, printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from kaun import _html
from kaun._calls import no_attribute
from kaun._messages import frames_hidden
from kaun.data import arguments
from kaun.data.nodes import Node, StageSpec
from kaun.data.passes import as_generator, watch_of
from kaun.data.rows import loses_rows, shown_item

if TYPE_CHECKING:
    from kaun.data.pipeline import Data

__all__ = ["Pipeline"]

T = TypeVar("T", covariant=True)


class _Names(type):
    """The class of ``Data``: what to write for a class method that it does not have."""

    if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other

        @frames_hidden
        def __getattr__(cls, name: str) -> Any:
            raise no_attribute(f"type object {cls.__name__!r}", "Data", name, cls)


class Pipeline(Generic[T], metaclass=_Names):
    """The part of ``Data`` that iterates a pipeline and keeps it as it is."""

    __slots__ = ("__weakref__", "_node", "_stages")
    _node: Node
    _stages: tuple[StageSpec, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "Data is made by its class methods: Data.batches((x, y), batch_size=64) for arrays, Data.from_items(items) "
            "for a list, Data.from_iterable(loader) for a loader."
        )

    def __iter__(self) -> Iterator[T]:
        # Always a generator, so that whoever iterates can close() it and with it the threads of prefetch. One that the
        # last stage makes is used without a frame around it: fit pulls an item for each step.
        node, first = self._node, watch_of(self._stages)
        if node.rows:
            return (shown_item(item) for item in as_generator(node.open, first))
        return node.open(None, 0, first) if node.takes_first else as_generator(node.open, first)

    def _real_rows(self, where: str, fix: str) -> Iterable[T]:
        """The items without filled rows, for packages that cannot import this one; refused if the rows have weights."""
        node = self._node
        if node.rows & {"weights", "local"}:
            raise loses_rows(where, node.rows, f"{fix}, or leave sample_weights out")
        return (item.rows.real(item.item) for item in node.open(None, 0)) if node.rows else self

    def __len__(self) -> int:
        if self._node.length is None:
            with frames_hidden:
                raise arguments.no_length(repr(self))
        return self._node.length

    if not TYPE_CHECKING:

        @frames_hidden
        def __getitem__(self, key: Any) -> NoReturn:
            fix = "list(data.skip(a).take(b - a))" if isinstance(key, slice) else f"next(iter(data.skip({key!r})))"
            raise TypeError(f"A pipeline is iterated: its items have no index. Write {fix}.")

        @frames_hidden
        def __add__(self, other: Any) -> NoReturn:
            raise TypeError(f"Data + {type(other).__name__}: pipelines are not added. Write Data.concat(a, b).")

    @frames_hidden
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Data is immutable; each method returns a new one, data = data.map(f), not .{name} =.")

    def __copy__(self) -> Data[T]:
        return cast("Data[T]", self)  # immutable, like a str

    def __deepcopy__(self, memo: Any) -> Data[T]:
        return cast("Data[T]", self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise arguments.not_picklable(repr(self))

    def __repr__(self) -> str:
        texts = [stage.text for stage in self._stages]
        return "".join(texts) if sum(map(len, texts)) <= 100 else "\n  ".join(texts)

    def _repr_html_(self) -> str:
        length = self._node.length
        stages = [(stage.text, "unknown" if stage.length is None else stage.length) for stage in self._stages]
        title = "Data of unknown length" if length is None else f"Data of {length:,} items"
        return _html.document(title, _html.table(("stage", "items"), stages))

    def _refuse_pieces(self, stage: str, why: str) -> None:
        """Refuse a stage that gives other items where each process has rows of its own."""
        if "local" in self._node.rows:
            raise TypeError(
                f"{stage} expected whole batches or single rows, and after local(s) each process has rows of its own. "
                f"{why}. Write it before the batches, data.{stage}.batch(64).local(s), or after assemble(s)."
            )

    def _then(self, node: Node, text: str, **given: Any) -> Data[Any]:
        return self._made(node, *self._stages, StageSpec(text, given, node.length))

    @classmethod
    def _made(cls, node: Node, *stages: StageSpec) -> Data[Any]:
        """A pipeline of a node; ``stages`` say what the user wrote, the source first."""
        data = object.__new__(cls)
        object.__setattr__(data, "_node", node)
        object.__setattr__(data, "_stages", stages)
        return cast("Data[Any]", data)

    @classmethod
    def _source(cls, node: Node, text: str, **given: Any) -> Data[Any]:
        return cls._made(node, StageSpec(text, given, node.length))

    @classmethod
    def _combined(cls, node: Node, text: str, sources: Sequence[Data[Any]], **given: Any) -> Data[Any]:
        return cls._source(node, text, sources=tuple(s._stages for s in sources), **given)
