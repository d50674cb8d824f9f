"""Two remote workers in network namespaces, over TLS and a token, next to Ray actors; one is killed in a shard."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import ports
import pytest
import tiny
import tls
from faults import everywhere

from metadist.config.build import build
from metadist.config.document import override, read_document, set_workers
from metadist.experiment.live import plain
from metadist.experiment.result import Result

pytestmark = pytest.mark.lane("services")

SHORT = [
    "evaluate.tasks=40",
    "evaluate.test_tasks=40",
    "engine.compile=never",
    "tracking.uri=none",
    "control.enabled=false",
]
SETTINGS = {
    "sinusoid_maml": ["outer.meta_steps=40", "outer.shard_size=3", "evaluate.every=20"],
    "bandit_rl2": ["outer.meta_steps=4", "outer.meta_batch_size=160", "outer.shard_size=20", "evaluate.every=2"],
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def places():
    """Two places: (a prefix that starts a command there, this machine's address there).

    Each place is a namespace that a pair of devices connects to ours.
    """
    found, undo = [], ExitStack()
    try:
        with undo:
            for i in range(2):
                # Names of its own each time: the kernel takes a while to forget those of the test before.
                number = secrets.randbelow(250 * 60)
                name, here = f"md{secrets.token_hex(4)}{i}", f"10.213.{number % 250}.{4 * (number // 250) + 1}"
                ip("netns", "add", name)
                undo.callback(ip, "netns", "delete", name)  # its device goes with it, and so does the other end
                ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
                ip("address", "add", f"{here}/30", "dev", f"{name}a")
                ip("link", "set", f"{name}a", "up")
                ip(
                    "-n",
                    name,
                    "address",
                    "add",
                    f"10.213.{number % 250}.{4 * (number // 250) + 2}/30",
                    "dev",
                    f"{name}b",
                )
                ip("-n", name, "link", "set", f"{name}b", "up")
                found.append((["ip", "netns", "exec", name], here))
            yield found
    except (OSError, subprocess.CalledProcessError) as error:
        if found and len(found) == 2:
            raise
        warnings.warn(f"no network namespaces here ({error}): over loopback", stacklevel=1)
        yield [([], "127.0.0.1")] * 2


class Killer:
    """SIGKILL to ``process`` once it has leases in the middle of the run."""

    def __init__(self, process: subprocess.Popen[str], meta_step: int) -> None:
        self.process, self.meta_step, self.leases = process, meta_step, 0

    def __call__(self, executor, shard):
        if self.leases or shard.split != "train" or shard.meta_step < self.meta_step:
            return
        for session in executor._remote.server.sessions:
            if session.applicant.pid == self.process.pid and session.leases:
                self.leases = len(session.leases)
                os.kill(self.process.pid, signal.SIGKILL)


def trained(made: dict, folder: Path, fault=None) -> Result:
    wrap = everywhere(fault) if fault else None
    return tiny.train(build(made), run_dir=str(folder), wrap=wrap, display=plain(), plots=False)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_of_one_process(tmp_path, places, name):
    made = override(read_document(name), [*SHORT, *SETTINGS[name]])
    alone = trained(set_workers(made, "0"), tmp_path / "alone")

    own = tls.make(tmp_path / "secrets", *{host for _, host in places})
    port = ports.free_port()
    everywhere = "127.0.0.1" if places[0][1] == "127.0.0.1" else "0.0.0.0"
    made["workers"] = [
        {"role": "learner", "min": 1, "max": 1, "gpus": 0},
        {"role": "learner", "min": 2, "max": 4, "outside": True},
    ]
    made["outside"] = {
        "listen": f"{everywhere}:{port}",
        "token_file": own.token,
        "tls_cert": own.certificate,
        "tls_key": own.key,
    }

    working = []
    for i, (inside, host) in enumerate(places):
        command = [
            *inside,
            sys.executable,
            "-m",
            "metadist",
            "worker",
            "--connect",
            f"{host}:{port}",
            "--name",
            f"box-{i}",
        ]
        command += ["--token-file", own.token, "--tls-ca", own.authority]
        working.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=tiny.environment(tmp_path, OMP_NUM_THREADS="1"),
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        killer = Killer(working[0], made["outer"]["meta_steps"] // 2)
        began = time.monotonic()
        together = trained(made, tmp_path / "together", killer)
        seconds = time.monotonic() - began
        said = [process.communicate(timeout=60)[0] for process in working]
    finally:
        for process in working:
            if process.poll() is None:
                process.kill()
    print(f"\n{name}: in one process    sha256 {alone.params_sha256}  {alone.wall_seconds:.1f} s")
    killed = f"killed with {killer.leases} leases; {together.retried}"
    print(f"{name}: Ray and 2 outside  sha256 {together.params_sha256}  {seconds:.1f} s; {killed}")
    for text in said:
        print(text)
    assert together.params_sha256 == alone.params_sha256
    assert together.evaluations[0].as_dict() == alone.evaluations[0].as_dict()
    assert killer.leases, "it had nothing to lose"
    assert [process.returncode for process in working] == [-signal.SIGKILL, 0]
    assert together.retried["lost"] >= 1
    assert all("shard computed" in text for text in said)
    assert "done: the run is over" in said[1]
