"""How many steps run at once.

A step is traced once for each kind of item (``inputs``, ``cache``), compiled into a loop over a block of items
(``program``, ``batching``), and dispatched by ``loop``, which owns the state while ``fit`` runs.
``evaluating`` runs metrics over blocks of items likewise. ``placing`` puts the arrays of a trainer with a sharding on
their devices. What a block gives is in ``results``, laid out by ``numbers``. ``flush`` is the program that ends an open
window of ``accumulate``. A step that is not finite (``failed``) can be run again one operation at a time (``replay``,
``source``).
"""

from kaun._engine.cache import ProgramCache as ProgramCache
from kaun._engine.evaluating import EvaluationLoop as EvaluationLoop
from kaun._engine.evaluating import evaluation_loop as evaluation_loop
from kaun._engine.failed import FailedStep as FailedStep
from kaun._engine.failed import error_of as error_of
from kaun._engine.failed import last_member_error as last_member_error
from kaun._engine.flush import run_flush as run_flush
from kaun._engine.inputs import StepInputs as StepInputs
from kaun._engine.inputs import as_arrays as as_arrays
from kaun._engine.inputs import check_input as check_input
from kaun._engine.inputs import refuse_traced as refuse_traced
from kaun._engine.log import Compilation as Compilation
from kaun._engine.loop import StepLoop as StepLoop
from kaun._engine.members import CODE as CODE
from kaun._engine.members import LOST as LOST
from kaun._engine.members import NOT_FINITE as NOT_FINITE
from kaun._engine.members import RUNS as RUNS
from kaun._engine.members import STOPPED as STOPPED
from kaun._engine.once import run_step as run_step
from kaun._engine.options import sums_members as sums_members
from kaun._engine.packing import MemberPacking as MemberPacking
from kaun._engine.packing import Packing as Packing
from kaun._engine.program import TracedStep as TracedStep
from kaun._engine.program import find_step as find_step
from kaun._engine.program import trace_step as trace_step
from kaun._engine.replay import Event as Event
from kaun._engine.replay import Origin as Origin
from kaun._engine.replay import Replay as Replay
from kaun._engine.replay import origin_of as origin_of
from kaun._engine.results import StepResults as StepResults
from kaun._engine.source import LAYER as LAYER
from kaun._engine.source import Source as Source
from kaun._engine.source import source_of as source_of
