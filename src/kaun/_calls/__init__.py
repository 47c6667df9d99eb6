"""Calls that Python refuses, and what to write instead: wrong arguments, wrong names, assignments to values.

A right call does no more work for it. ``values`` is what the immutable classes have in common.
"""

from kaun._calls.values import frozen as frozen
