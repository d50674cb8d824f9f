"""Check your own algorithms, task families, environments and models by the properties that metadist relies on.

::

    # test_mine.py
    import pytest
    from metadist.testing import check_algorithm, check_model, check_tasks
    from mine import MyAlgorithm, MyNet, MyTasks

    def test_my_tasks():
        check_tasks(MyTasks(k_shot=3))

    @pytest.mark.parametrize("inner_steps", [1, 3])
    def test_my_algorithm(inner_steps):
        check_algorithm(MyAlgorithm(inner_steps=inner_steps), tasks=MyTasks(), model=MyNet())

Each function returns None, or raises a ``PropertyError``, an AssertionError whose message names the property, the
object, the values and the remedy. metadist's own components pass the same functions (``tests/conformance``).

The tables ``FEW_SHOT_PROPERTIES`` (of a learner), ``TRIAL_PROPERTIES`` (of a learner of meta-reinforcement learning),
``CARRIED_PROPERTIES`` (of a learner of particles),
``TASK_PROPERTIES`` (of a family and a split) and ``ENVIRONMENT_PROPERTIES`` hold the single properties by name, for
tests that show each one apart. ``quadratics`` has tasks whose meta-gradients are known in closed form, ``toys`` further
tasks without data.
"""

from metadist.testing.algorithms import check_algorithm
from metadist.testing.environments import ENVIRONMENT_PROPERTIES, check_environment
from metadist.testing.executors import check_executor
from metadist.testing.failures import (
    ImpureError,
    InexactError,
    PropertyError,
    RoundTripError,
    RowError,
    SameTasksError,
    ShapeError,
    UnusableError,
    WrongGradientError,
)
from metadist.testing.few_shot import FEW_SHOT_PROPERTIES
from metadist.testing.models import check_model
from metadist.testing.particles import CARRIED_PROPERTIES
from metadist.testing.tasks import TASK_PROPERTIES, check_tasks
from metadist.testing.trials import TRIAL_PROPERTIES

__all__ = [
    "CARRIED_PROPERTIES",
    "ENVIRONMENT_PROPERTIES",
    "FEW_SHOT_PROPERTIES",
    "TASK_PROPERTIES",
    "TRIAL_PROPERTIES",
    "ImpureError",
    "InexactError",
    "PropertyError",
    "RoundTripError",
    "RowError",
    "SameTasksError",
    "ShapeError",
    "UnusableError",
    "WrongGradientError",
    "check_algorithm",
    "check_environment",
    "check_executor",
    "check_model",
    "check_tasks",
]
