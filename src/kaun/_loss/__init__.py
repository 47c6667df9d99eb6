"""How a loss is compiled once.

A loss is a fresh closure for each batch. It is taken apart into a static key and the arrays that it captures
(``capture``), and made again from the key around traced arrays (``rebuild``) while the step is traced (``trace``).
"""

from kaun._loss.capture import FrozenLoss as FrozenLoss
from kaun._loss.capture import capture_loss as capture_loss
from kaun._loss.capture import snapshot_loss as snapshot_loss
from kaun._loss.code import attributes_read as attributes_read
from kaun._loss.code import names_read as names_read
from kaun._loss.code import own_methods as own_methods
from kaun._loss.describe import captures as captures
from kaun._loss.describe import subject as subject
from kaun._loss.origin import is_own as is_own
from kaun._loss.origin import is_own_module as is_own_module
from kaun._loss.rebuild import Rebuilt as Rebuilt
from kaun._loss.rebuild import parts as parts
from kaun._loss.trace import trace_function as trace_function
from kaun._loss.trace import trace_loss as trace_loss
