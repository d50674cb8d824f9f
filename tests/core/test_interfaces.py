"""The declared attributes of algorithms and task families: their defaults, and all ways to override them."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch

from metadist.algorithms import ALGORITHMS, MAML, Reptile
from metadist.core.algorithm import Algorithm, at_most_one_step, with_inner_steps
from metadist.core.parameters import Parameters
from metadist.core.task import TaskFamily
from metadist.rl.environment import MetaEnvironment


class Bare(Algorithm):
    pass


@dataclass(frozen=True)
class Steps(Algorithm):
    inner_steps: int = 3
    first_order: bool = True


class Delta(Algorithm):
    def delta(self, theta, phi):
        return {"model": theta["model"] - phi}


@dataclass(frozen=True)
class Huber(MAML):
    """A setting may share its first letters with a declared name, but not more."""

    delta_of_loss: float = 0.1


def test_a_bare_algorithm_has_no_inner_loop_and_contributes_gradients():
    assert (Bare().inner_steps, Bare().first_order, Bare().contribution) == (0, False, "gradient")
    assert at_most_one_step(Bare()).inner_steps == 0
    with pytest.raises(NotImplementedError):
        Bare().delta({}, Parameters({}))


def test_fields_replace_the_declared_attributes():
    assert (Steps().inner_steps, Steps(5, False).inner_steps, Steps(5, False).first_order) == (3, 5, False)
    assert at_most_one_step(Steps()).inner_steps == 1
    assert with_inner_steps(Steps(), 7) == Steps(7)


def test_the_contribution_is_a_delta_where_the_method_is_overridden():
    theta = {"model": Parameters({"w": torch.tensor([3.0])})}
    assert Delta().contribution == Reptile().contribution == "delta"
    assert Delta().delta(theta, Parameters({"w": torch.tensor([1.0])}))["model"]["w"].item() == 2.0
    assert MAML().contribution == Huber().contribution == "gradient"


def test_of_the_built_in_algorithms_only_reptile_contributes_deltas():
    supervised = {n: kind for n, kind in ALGORITHMS.items() if issubclass(kind, Algorithm)}
    assert {n for n, kind in supervised.items() if kind().contribution == "delta"} == {"reptile"}


class ByProperty(TaskFamily):
    @property
    def data_sha256(self):
        return "f" * 64


@dataclass(frozen=True)
class ByField(TaskFamily):
    data_sha256: str
    on_error: str = "skip"


class ByAssignment(TaskFamily):
    def __init__(self):
        self.data_sha256 = "e" * 64


def test_task_families_override_declared_attributes_by_property_field_or_assignment():
    assert (TaskFamily().data_sha256, TaskFamily().decode, TaskFamily().on_error) == (None, None, None)
    assert ByProperty().data_sha256 == "f" * 64
    assert (ByField("d" * 64).data_sha256, ByField("d" * 64).on_error) == ("d" * 64, "skip")
    for made in (ByAssignment(), copy.copy(ByAssignment()), pickle.loads(pickle.dumps(ByAssignment()))):
        assert made.data_sha256 == "e" * 64


def test_a_bare_environment_has_the_same_defaults():
    assert (MetaEnvironment().data_sha256, MetaEnvironment().on_error) == (None, None)
