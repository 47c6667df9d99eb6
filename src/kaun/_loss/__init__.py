"""How a loss is compiled once, although it is a new closure for each batch.

A loss is taken apart into a *key*, which is static, and the *arrays* that it captures, which become arguments of the
compiled step. Losses with equal keys share one program. What the code reads is thus an argument (an array), a part of
the key (all else), or refused. Read the files in this order, which is the order of the work:

1. ``capture``: the entry, ``capture_loss``. A callable of a known form is captured by ``Warm``, any other by a walk.
2. ``walk``: the key; the walk, which builds it and notes what it reads; the warm form, which is made of these notes.
3. ``values`` and ``objects``: a handler for each type. Functions are followed through cells, defaults and globals, and
   objects, classes and modules by the attributes that the code names.
4. ``code`` and ``origin``: what the bytecode names, and whether a package is a library or the user's own.
5. ``rebuild``: the callable of a key made again, around traced arrays, with stand-ins in place of objects.
6. ``watch``: what the callable must not do while it is traced: write, and read by names that are not in its code.
7. ``trace``: all of it together, ``trace_loss``, which also looks for arrays that no walk could find.
8. ``describe``: a key in words, for messages and for the reasons of compilations.
"""

from kaun._loss.capture import FrozenLoss as FrozenLoss
from kaun._loss.capture import Loss as Loss
from kaun._loss.capture import capture_loss as capture_loss
from kaun._loss.capture import snapshot_loss as snapshot_loss
from kaun._loss.code import attributes_of as attributes_of
from kaun._loss.code import code_info as code_info
from kaun._loss.code import function_reads as function_reads
from kaun._loss.code import methods_of as methods_of
from kaun._loss.code import reads_by_name as reads_by_name
from kaun._loss.describe import array_names as array_names
from kaun._loss.describe import captures as captures
from kaun._loss.describe import subject as subject
from kaun._loss.origin import is_library as is_library
from kaun._loss.rebuild import parts as parts
from kaun._loss.rebuild import rebuild_loss as rebuild_loss
from kaun._loss.trace import TracedLoss as TracedLoss
from kaun._loss.trace import Weighted as Weighted
from kaun._loss.trace import trace_function as trace_function
from kaun._loss.trace import trace_loss as trace_loss
