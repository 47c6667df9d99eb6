"""Where the arrays of a run lie on many devices: what ``Trainer(sharding=)`` takes.

A ``Sharding`` is a value: a mesh, the mesh axes over which the rows of a batch lie, and a rule for the parameters.
"""

# Read core first. rules are the rules, and makers the functions that users call. Nothing here knows of steps.

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun.sharding.core import Sharding as Sharding
from kaun.sharding.core import put as put
from kaun.sharding.makers import by_path as by_path
from kaun.sharding.makers import data_parallel as data_parallel
from kaun.sharding.makers import fsdp as fsdp
from kaun.sharding.makers import members as members
from kaun.sharding.makers import mesh as mesh

if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)
