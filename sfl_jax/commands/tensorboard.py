"""Writes the rounds of a run as events for TensorBoard."""

import contextlib
import importlib.util
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sfl_jax.errors import BadInput

DIRECTORY, SUFFIX = "tensorboard", ".sfl_jax"
FLUSH_S = 2.0  # seconds after which events are on the disk
_GROUPS = {
    "loss": ("train_loss", "test_loss"),
    "accuracy": ("test_accuracy", "client_accuracy_mean", "client_accuracy_worst"),
    "plan": ("round_s", "bound_s", "simulated_s", "clients", "mean_cut"),
}


def check(wanted: bool) -> None:
    """BadInput if events are wanted and the package that writes them is missing."""
    if wanted and importlib.util.find_spec("tensorboardX") is None:
        raise BadInput("--tensorboard=true: needs the package tensorboardX; install sfl_jax[tensorboard]")


class Events:
    """The events of a run in its workdir, one file, in the same order as metrics.jsonl.

    The file is written anew at each start, with the rounds that are done. So it has no round twice. An error
    of the disk ends the file with a warning, and not the run.

    done: the lines of metrics.jsonl so far.
    """

    def __init__(self, workdir: str, done: Iterable[Any] = ()):
        lines = list(done)
        self._began = time.time() - (lines[-1].wall_s if lines else 0.0)
        self._flushed = time.monotonic()
        self._writer: Any = None
        with self._no_error():
            self._open(Path(workdir) / DIRECTORY)
        for line in lines:
            self.add(line)

    def add(self, line: Any) -> None:
        """Adds the line of a round."""
        if self._writer is not None:
            with self._no_error():
                self._add(line)

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            with self._no_error():
                self._writer.close()
        self._writer = None

    @contextlib.contextmanager
    def _no_error(self):
        try:
            yield
        except OSError as error:
            broken, self._writer = self._writer, None
            if broken is not None:
                with contextlib.suppress(OSError):
                    broken.close()
            logging.warning("TensorBoard: not written: %s; its file ends here", error)

    def _open(self, directory):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(exist_ok=True)
        for old in directory.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer = EventsWriter(str(directory / "events"), SUFFIX)

    def _add(self, line):
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        known = {name: value for name, value in line.to_json().items() if value is not None}
        values = [Summary.Value(tag=tag(name), simple_value=known[name]) for name in known if name != "round"]
        event = Event(wall_time=self._began + line.wall_s, step=line.round, summary=Summary(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed >= FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()


def tag(name: str) -> str:
    """The field's name below the heading that TensorBoard shows it under."""
    for group, names in _GROUPS.items():
        if name in names:
            return f"{group}/{name}"
    kinds = {"_bytes": "bytes", "_flop": "work", "_wall_s": "machine", "wall_s": "machine"}
    group = next((kind for end, kind in kinds.items() if name.endswith(end)), "machine")
    return f"{group}/{name}"
