"""Contract suites: what every backend of an interface must do, for ours and for yours.

There is one module per interface. A suite is a class of tests for pytest; subclass it,
under a name that pytest collects, and define its fixtures:

    class TestMyLocker(LockerContract):
        @pytest.fixture
        def locker(self):
            return MyLocker()
"""

import pytest

pytest.register_assert_rewrite(
    "tuswsgi.testing.datastores",
    "tuswsgi.testing.eventstores",
    "tuswsgi.testing.infostores",
    "tuswsgi.testing.leases",
    "tuswsgi.testing.lockers",
    "tuswsgi.testing.recordstores",
)
