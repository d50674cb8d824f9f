"""A driver, for tests to kill and resume: a step every 10 ms, its number checkpointed every 20."""

import sys
import time
from pathlib import Path

from metadist.tracking import make_tracker


def main(root: Path, uri: str, steps: int) -> None:
    checkpoint = root / "step"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    tracker = make_tracker(uri, spool=root / "run/tracking", experiment="kills", runs_root=root, interval=0.1)
    tracker.start(run_id="run-1", name="run", params={"lr": 0.1, "attempt_at": first}, tags={"git": "abc"})
    for step in range(first + 1, steps + 1):
        tracker.metrics(step, {"meta/loss": 1 / step, "engine/seconds": time.time()})
        if step % 20 == 0:
            tracker.flush()
            checkpoint.with_suffix(".new").write_text(str(step))
            checkpoint.with_suffix(".new").replace(checkpoint)
        time.sleep(0.01)
    print(tracker.finish("FINISHED", 180), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
