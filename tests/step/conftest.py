"""What several files ask of a fit: the values of each step, read in blocks."""

import pytest

from kaun import reports


class Blocks(reports.Report):
    """Wants no step, and has the values of all steps, by name, in ``values``."""

    def __init__(self):
        self.values = {}

    def wants(self, step):
        return False

    def block(self, first, values):
        for name in values:
            self.values.setdefault(name, []).extend(values[name].tolist())


@pytest.fixture
def blocks():
    return Blocks()
