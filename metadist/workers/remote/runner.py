"""The worker's side of a lease: an actor in this process, with a learner that is built from the run's config."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from metadist.config.modules import code_modules
from metadist.config.schema import parse_document
from metadist.core.errors import MetadistError, NonFiniteError
from metadist.learners.base import Learner
from metadist.wire.codec import RejectedError
from metadist.workers.actor import Actor, ActorSettings
from metadist.workers.calls import MissingError
from metadist.workers.remote.messages import Computed, Configure, Failure, Lease, Terms
from metadist.workers.worker import TaskError


class Runner:
    """Build the run's learner with ``build(config)`` and compute leases; failures are returned as data.

    ``device`` overrides the device of the run's config. ``gpus`` is 1 where this process may use a GPU.
    """

    def __init__(self, build: Callable[[str], Learner], device: str | None = None, gpus: float = 0.0) -> None:
        self._build, self._device, self._gpus = build, device, gpus
        self._built: tuple[str, Learner] | None = None

    def start(self, terms: Terms) -> tuple[dict[str, Any], dict[str, Any]]:
        """Build the learner and load its data. Return the facts about the device and about this worker.

        Raises MetadistError where this machine can't do what the config asks.
        """
        if self._built is None or self._built[0] != terms.config:  # a driver that resumes sends the same config
            self._built = terms.config, self._build(terms.config)
        device = self._device or terms.device
        learner = self._built[1]
        modules = code_modules(parse_document(terms.config, "the run's config"), learner.tasks, learner.algorithm)
        settings = ActorSettings(terms.worker, terms.role, device, self._gpus, terms.threads, modules=modules)
        self._actor = Actor(learner, settings)
        about = self._actor.start()
        return asdict(about.pop("describes")), about

    def configure(self, order: Configure) -> dict[str, Any]:
        """Prepare to compute with the run's engine, and return the facts about this worker then.

        Raises MetadistError where this machine can't do that.
        """
        return self._actor.configure(order.engine, order.seed)

    def compute(self, lease: Lease) -> Computed | Failure:
        """Compute a lease."""
        theta = None if lease.theta is None else _buffers(lease.theta())
        outputs = [None if content is None else _buffers(content()) for content in lease.outputs]
        try:
            answer = self._actor.compute(lease.call, theta, *outputs)
        except MissingError as error:
            return Failure("missing", str(error), missing=error.keys)
        except NonFiniteError as error:
            return Failure("rejected", str(error), error.tasks)
        except RejectedError as error:
            return Failure("rejected", str(error))
        except TaskError as error:
            return Failure("error", str(error), error.tasks, "".join(traceback.format_exception(error)))
        except MetadistError as error:
            return Failure("unable", str(error))
        if not lease.call.shard.keeps:
            return Computed(answer)
        result, output = answer
        return Computed(result, None if lease.call.shard.carries else output)

    def held(self, token: int) -> list[pa.Buffer] | None:
        """Return the frame, in parts, of an output that lies here; None where it does not. Any thread may call it."""
        return self._actor.held(token)


def _buffers(parts: Iterable[Any]) -> list[pa.Buffer]:
    return [pa.py_buffer(p) for p in parts]
