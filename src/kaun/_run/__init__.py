"""How a run is resumed: what it is (``identity``), where it stands (``run``, ``position``), and when it is saved."""

from kaun._run.report_state import pack_snapshot as pack_snapshot
from kaun._run.report_state import unpack_snapshot as unpack_snapshot
from kaun._run.reports import ReportCaller as ReportCaller
from kaun._run.run import TrainingRun as TrainingRun
from kaun._run.run import open_run as open_run
from kaun._run.saver import flush_and_save as flush_and_save
from kaun._run.saver import save_on_error as save_on_error
from kaun._run.signals import Signals as Signals
