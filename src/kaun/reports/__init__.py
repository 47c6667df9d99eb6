"""Reports: what ``fit`` calls after its steps."""

from kaun.reports.core import all_of as all_of
from kaun.reports.core import each_epoch as each_epoch
from kaun.reports.core import every as every
from kaun.reports.history import History as History
from kaun.reports.history import history as history
from kaun.reports.progress import progress as progress
from kaun.reports.validate import Validation as Validation
from kaun.reports.validate import validate as validate
from kaun.train import Report as Report
