"""How data flows: ``Data``, a lazy pipeline of items, and what ``fit`` needs of any iterable.

``pipeline`` has the methods that users call, ``nodes`` what a stage does, ``loaders`` the loaders of other libraries.
"""

from kaun._loss import Loss as Loss
from kaun.data.chunks import Chunk as Chunk
from kaun.data.chunks import RowGather as RowGather
from kaun.data.chunks import open_items as open_items
from kaun.data.convert import as_arrays as as_arrays
from kaun.data.convert import is_tensor as is_tensor
from kaun.data.convert import loader_facts as loader_facts
from kaun.data.items import check_context as check_context
from kaun.data.items import check_loss as check_loss
from kaun.data.items import empty_data as empty_data
from kaun.data.items import known_length as known_length
from kaun.data.items import not_data as not_data
from kaun.data.items import parse_item as parse_item
from kaun.data.loaders import ResumableLoader as ResumableLoader
from kaun.data.loaders import loader_length as loader_length
from kaun.data.nodes import StageSpec as StageSpec
from kaun.data.nodes import checked_count as checked_count
from kaun.data.pipeline import Data as Data
from kaun.data.pipeline import chunks_of as chunks_of
from kaun.data.pipeline import replayed as replayed
from kaun.data.pipeline import stages_of as stages_of

__all__ = ["Data"]  # what users reach; the rest is for the other packages
