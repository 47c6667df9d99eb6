"""Calls that Python refuses, and what to write instead: wrong arguments, wrong names, assignments, foreign objects.

A right call does no more work for it: ``explained`` looks at a call after Python has refused it, and a ``__getattr__``
is called for names that are not there. ``values`` has what immutable classes refuse. What is said lies in the tables
``texts`` (arguments) and ``renamed`` (names).
"""

from kaun._calls.foreign import foreign_function as foreign_function
from kaun._calls.foreign import layer_for as layer_for
from kaun._calls.foreign import model_for as model_for
from kaun._calls.names import advice as advice
from kaun._calls.names import module_names as module_names
from kaun._calls.names import no_attribute as no_attribute
from kaun._calls.names import refuse_name as refuse_name
from kaun._calls.refusal import MISSING as MISSING
from kaun._calls.refusal import explained as explained
from kaun._calls.refusal import is_explained as is_explained
from kaun._calls.refusal import is_refused as is_refused
from kaun._calls.refusal import public as public
from kaun._calls.refusal import shown as shown
from kaun._calls.refusal import shows_overload as shows_overload
from kaun._calls.refusal import wrong_fit as wrong_fit
from kaun._calls.refusal import wrong_step as wrong_step
from kaun._calls.values import explained_methods as explained_methods
from kaun._calls.values import frozen as frozen
from kaun._calls.values import has_items as has_items
from kaun._calls.values import refuse_items as refuse_items
from kaun._calls.values import refuse_property as refuse_property
from kaun._calls.values import with_advice as with_advice
