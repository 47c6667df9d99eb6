"""How a run is resumed: what it is, how far it is, and when it is saved.

Read ``run`` first, then ``steps``, which makes the loop of a run and flushes its last window. ``identity`` has the
facts by which a run knows its data and program, ``position`` its place in the data, and ``saver`` decides when a
checkpoint is due and which step is the best. ``reports`` calls the report with the ``values`` of finished steps, and
``report_state`` saves what reports keep. ``agree`` is what several processes decide together.
"""

from kaun._run.failure import save_on_error as save_on_error
from kaun._run.repeats import Repeats as Repeats
from kaun._run.report_state import keeping as keeping
from kaun._run.report_state import match_reports as match_reports
from kaun._run.report_state import pack_results as pack_results
from kaun._run.report_state import report_kind as report_kind
from kaun._run.report_state import saved_values as saved_values
from kaun._run.report_state import snapshot_reports as snapshot_reports
from kaun._run.report_state import unpack_results as unpack_results
from kaun._run.reports import check_returned as check_returned
from kaun._run.run import open_run as open_run
from kaun._run.steps import finished_state as finished_state
from kaun._run.steps import flush_and_save as flush_and_save
from kaun._run.steps import flush_state as flush_state
from kaun._run.steps import start_loop as start_loop
from kaun._run.values import StepValues as StepValues
