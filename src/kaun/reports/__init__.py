"""Reports: what ``fit`` calls after its steps.

The interface is ``Report``; a function ``(step, loss, state)`` is a report too. ``all_of`` combines reports, and passes
the values that one measures to the others.
"""

# compose combines reports. The loggers (files, tensorboard, wandb, mlflow) share log; with history they share epochs,
# the averages over a pass.

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun._report import Report as Report
from kaun._report import ReportFunction as ReportFunction
from kaun.reports.compose import all_of as all_of
from kaun.reports.compose import each_epoch as each_epoch
from kaun.reports.compose import every as every
from kaun.reports.early_stopping import EarlyStopping as EarlyStopping
from kaun.reports.early_stopping import early_stopping as early_stopping
from kaun.reports.files import csv as csv
from kaun.reports.files import jsonl as jsonl
from kaun.reports.history import History as History
from kaun.reports.history import history as history
from kaun.reports.learning_rate import learning_rate as learning_rate
from kaun.reports.mlflow import mlflow as mlflow
from kaun.reports.plot import plot as plot
from kaun.reports.profile import Profile as Profile
from kaun.reports.profile import profile as profile
from kaun.reports.progress import progress as progress
from kaun.reports.prune import prune as prune
from kaun.reports.tensorboard import tensorboard as tensorboard
from kaun.reports.throughput import throughput as throughput
from kaun.reports.time_limit import time_limit as time_limit
from kaun.reports.validate import Validation as Validation
from kaun.reports.validate import validate as validate
from kaun.reports.wandb import wandb as wandb
from kaun.reports.watch import Watch as Watch
from kaun.reports.watch import watch as watch

if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)
