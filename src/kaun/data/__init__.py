"""How data flows: ``Data``, a lazy pipeline of items, and what ``fit`` needs of any iterable.

``sources`` and ``pipeline`` have the methods that users call, on top of ``base``; ``nodes`` and ``combine`` what a
stage does, ``items`` what an item is, ``loaders`` the loaders of other libraries. ``rows`` is what is known of the rows
of a batch besides its arrays; ``padding`` (``pad=True``, ``sample_weights=``) and ``buckets`` make such batches.
"""

from kaun.data.access import chunks_of as chunks_of
from kaun.data.access import every_stage_of as every_stage_of
from kaun.data.access import has_exact_length as has_exact_length
from kaun.data.access import loaders_of as loaders_of
from kaun.data.access import makes_items as makes_items
from kaun.data.access import over_loader as over_loader
from kaun.data.access import refuse_lost_rows as refuse_lost_rows
from kaun.data.access import rest_of as rest_of
from kaun.data.access import resume_of as resume_of
from kaun.data.access import stages_of as stages_of
from kaun.data.access import with_rows as with_rows
from kaun.data.alike import checksums as checksums
from kaun.data.alike import different_items as different_items
from kaun.data.alike import key_text as key_text
from kaun.data.alike import stages_in_words as stages_in_words
from kaun.data.arguments import checked_count as checked_count
from kaun.data.chunks import Chunk as Chunk
from kaun.data.chunks import RowGather as RowGather
from kaun.data.chunks import is_explicit as is_explicit
from kaun.data.convert import as_arrays as as_arrays
from kaun.data.convert import is_tensor as is_tensor
from kaun.data.items import Item as Item
from kaun.data.items import LabelledItem as LabelledItem
from kaun.data.items import check_context as check_context
from kaun.data.items import check_loss as check_loss
from kaun.data.items import empty_data as empty_data
from kaun.data.items import not_data as not_data
from kaun.data.libraries import generator_state as generator_state
from kaun.data.libraries import is_generator as is_generator
from kaun.data.libraries import loader_facts as loader_facts
from kaun.data.libraries import parts_that_make_items as parts_that_make_items
from kaun.data.loaders import known_length as known_length
from kaun.data.loaders import open_items as open_items
from kaun.data.loaders import opened_loaders as opened_loaders
from kaun.data.passes import PassLength as PassLength
from kaun.data.passes import newest_pass as newest_pass
from kaun.data.passes import pass_length as pass_length
from kaun.data.passes import random_passes as random_passes
from kaun.data.pipeline import Data as Data
from kaun.data.resumable import Check as Check
from kaun.data.resumable import ResumableLoader as ResumableLoader
from kaun.data.rows import RowInfo as RowInfo
from kaun.data.rows import RowsItem as RowsItem
from kaun.data.types import Unknown as Unknown

__all__ = ["Data"]  # what users reach; the rest is for the other packages
