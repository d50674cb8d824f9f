"""Outputs that later rounds of a meta-step need: where an executor keeps them, and how two executors share them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from metadist.core.round import Event, Executor, Failed, Finished, OutputKey, RoundKey, Shard
from metadist.engine.plan import Plan
from metadist.workers.calls import Call, Content, Settled
from metadist.workers.states import content_of, counted, saved

ThetaT = TypeVar("ThetaT")
StoredT = TypeVar("StoredT")


@dataclass(frozen=True)
class KeptOutput(Generic[StoredT]):
    """The output of ``shard``, made by the call ``token``, in the form in which the executor stores outputs."""

    shard: Shard
    token: int
    stored: StoredT


class KeptOutputs(Generic[ThetaT, StoredT]):
    """The outputs of a meta-step's shards, and the θ of every round that has outputs.

    Lost outputs are computed again under the θ of their round. The outputs of shards that ``carries`` are states: the
    next meta-step needs them too.
    """

    def __init__(self) -> None:
        #: (version, θ). One meta-step publishes several θ: of its rounds, its validation, the test of the best
        self.thetas: dict[RoundKey, tuple[int, ThetaT]] = {}
        self.outputs: dict[OutputKey, KeptOutput[StoredT]] = {}
        self._rounds: set[RoundKey] = set()
        #: the rounds that states come from
        self._carrying: set[RoundKey] = set()
        self._version = self._token = 0

    def publish(self, meta_step: int, round: int, theta: ThetaT) -> None:
        """Add the θ of a round; drop the θs that no output comes from.

        Round 0 drops all outputs, except for the states of the meta-step before.
        """
        if round == 0:
            self._rounds.clear()
            self.outputs = {
                k: o for k, o in self.outputs.items() if o.shard.carries and o.shard.meta_step >= meta_step - 1
            }
        self._version += 1
        self.thetas = {r: t for r, t in self.thetas.items() if r in self._rounds or r in self._carrying}
        self.thetas[meta_step, round] = (self._version, theta)

    def release(self, meta_step: int) -> None:
        """Drop the θs of states of earlier meta-steps than ``meta_step``."""
        self._carrying = {r for r in self._carrying if r[0] >= meta_step}
        self.thetas = {r: t for r, t in self.thetas.items() if r[0] >= meta_step or r in self._rounds}

    def hold(self, shard: Shard) -> None:
        """Keep the θ of the shard's round, although all outputs of the round may lie elsewhere."""
        (self._carrying if shard.carries else self._rounds).add(shard.of_round)

    def theta(self, shard: Shard) -> tuple[int, ThetaT | None]:
        """Return version and θ of the shard's round; (0, None) for a shard that needs no θ."""
        return self.thetas[shard.of_round] if shard.computation.reads_theta else (0, None)

    def lies_with(self, shard: Shard, holds: set[int]) -> bool:
        """Return whether a worker with the tokens ``holds`` has all outputs that ``shard`` needs."""
        return not self.lacking(shard) and all(output.token in holds for output in self.needed(shard))

    @property
    def tokens(self) -> set[int]:
        """The tokens of all outputs."""
        return {output.token for output in self.outputs.values()}

    def keep(self, shard: Shard, stored: StoredT, token: int | None = None) -> None:
        """Keep the output of ``shard``, made by the call ``token``; without a token the output gets a new one."""
        self.hold(shard)
        self.outputs[shard.key] = KeptOutput(shard, self._new_token() if token is None else token, stored)

    def keep_answer(self, call: Call, stored: StoredT) -> bool:
        """Keep the output that ``call`` made. Return False where the round has another θ by now."""
        known = not call.version or call.shard.of_round in self.thetas
        if not known or self.theta(call.shard)[0] != call.version:
            return False
        self.keep(call.shard, stored, call.token)
        return True

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]:
        """Return the keys of the outputs that ``shard`` needs and that are not here."""
        return tuple(key for key in shard.needs if key not in self.outputs)

    def needed(self, shard: Shard) -> tuple[KeptOutput[StoredT], ...]:
        """Return the outputs that ``shard`` needs, in the order of ``shard.needs``."""
        return tuple(self.outputs[key] for key in shard.needs)

    def call(self, shard: Shard, attempt: int, settled: Settled | None = None) -> Call:
        """Return a new call for ``shard``, under the θ of its round and with the outputs that it needs."""
        needs = tuple((output.shard, output.token) for output in self.needed(shard))
        since = min([shard.meta_step, *(output.shard.meta_step for output in self.outputs.values())])
        return Call(shard, attempt, self.theta(shard)[0], self._new_token(), needs, settled, since)

    def _new_token(self) -> int:
        self._token += 1
        return self._token

    def forget(self, call: Call, keys: tuple[OutputKey, ...]) -> tuple[OutputKey, ...]:
        """Drop the outputs ``keys`` that ``call`` lacked, and return the keys of those that were dropped.

        An output that was computed again since the call is not lost: it is enough to submit the shard again.
        """
        asked = {shard.key: token for shard, token in call.needs}
        lost = tuple(k for k in keys if k in asked and k in self.outputs and self.outputs[k].token == asked[k])
        for key in lost:
            del self.outputs[key]
        return lost


class KeepingExecutor(Executor, ABC, Generic[ThetaT, StoredT]):
    """An executor that keeps outputs in ``_kept``, and shares outputs with another executor."""

    plan: Plan | None

    def __init__(self) -> None:
        self._kept: KeptOutputs[ThetaT, StoredT] = KeptOutputs()

    @abstractmethod
    def content_of(self, output: KeptOutput[StoredT]) -> Content:
        """Return the output as a frame that is fetched when it is read."""

    @abstractmethod
    def stored_from(self, shard: Shard, content: Content) -> StoredT:
        """Return the output of ``shard`` in the form in which this executor stores outputs."""

    def lacking(self, shard: Shard) -> tuple[OutputKey, ...]:
        """Return the keys of the outputs that ``shard`` needs and that are not here."""
        return self._kept.lacking(shard)

    def hold(self, shard: Shard) -> None:
        """Keep the θ of the shard's round, since its output lies elsewhere."""
        self._kept.hold(shard)

    def release(self, meta_step: int) -> None:
        self._kept.release(meta_step)

    def output(self, key: OutputKey) -> tuple[Shard, Content] | None:
        """Return the shard and the content of an output, or None where it is not here."""
        kept = self._kept.outputs.get(key)
        return None if kept is None else (kept.shard, self.content_of(kept))

    def adopt(self, shard: Shard, content: Content) -> None:
        """Keep an output that another executor made."""
        self._kept.keep(shard, self.stored_from(shard, content))

    def _by_driver(self, shard: Shard, attempt: int) -> Event:
        """Save or load the states of ``shard`` here: the folder is on this machine, and the workers are not."""
        if shard.keeps:
            self._kept.keep(shard, self.stored_from(shard, lambda: [content_of(shard)]))
            return Finished(shard, attempt, "driver", counted(shard))
        from metadist.wire.codec import decode_output

        [kept] = self._kept.needed(shard)
        try:
            states = decode_output(list(self.content_of(kept)()), kept.shard)
        except Exception as error:  # the holder has died, or its store raises errors of its own
            reason = f"the states that it needs can't be fetched ({type(error).__name__})"
            return self._lost(self._kept.call(shard, attempt), shard.needs, reason, "driver")
        return Finished(shard, attempt, "driver", saved(shard, states, "driver"))

    def _missing(self, shard: Shard, attempt: int) -> Failed | None:
        """Return the event for a shard whose needed outputs are not all here."""
        missing = self._kept.lacking(shard)
        if not missing:
            return None
        return Failed(shard, attempt, "driver", "missing", "an output that it needs is not there", missing=missing)

    def _lost(self, call: Call, keys: tuple[OutputKey, ...], reason: str, worker: str) -> Failed:
        """Drop the outputs that a call lacked, and return the event for its shard."""
        missing = self._kept.forget(call, keys)
        return Failed(call.shard, call.attempt, worker, "missing", reason, missing=missing)
