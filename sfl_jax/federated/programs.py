"""Tells a person how long compiling a round's program may take, from notes of earlier starts."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sfl_jax.files import whole_file

NAME = "programs.json"


class Programs:
    """Notes about compiled programs on this device: seconds to compile one, and to load a kept one.

    notes: a file in the directory of kept programs; None if nothing is kept.
    """

    def __init__(self, notes: Path | None, devices: Sequence[Any]):
        self._path = notes and notes.with_name(NAME)
        self._directory = jax.config.jax_compilation_cache_dir if notes else None  # pyright: ignore[reportAttributeAccessIssue]
        self._device = f"{len(devices)} x {devices[0].device_kind}"
        self._entries = self._read()

    def expected(self, network: str, program: str) -> str:
        """A line that says what comes now, compiling or loading, and about how long it takes if that is
        known.

        program: distinguishes this program from others of the same network.
        """
        same = self._entries.get(self._of_device(f"{network}, {program}"), {})
        if same:
            return f"loading the compiled round{_about(same.get('loaded_s'))}"
        alike = [
            one["compiled_s"]
            for one in self._entries.values()
            if one.get("model") == self._of_device(network)
        ]
        kept = f"kept in {_short(self._directory)}" if self._directory else "not kept"
        if not alike:
            return f"compiling the round ({kept}; a large network takes minutes)"
        return f"compiling the round (about {alike[-1]:.0f} s the first time; {kept})"

    def took(self, network: str, program: str, seconds: float) -> None:
        """Notes how long it took, if the disk allows it."""
        if self._path is None:
            return
        key, entries = self._of_device(f"{network}, {program}"), self._read()
        if key in entries:
            entries[key]["loaded_s"] = seconds
        else:
            entries[key] = {"model": self._of_device(network), "compiled_s": seconds}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self._path) as file:
                file.write(json.dumps(entries, indent=1).encode())
        self._entries = entries

    def _read(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads(self._path.read_bytes()) if self._path else {}
            return {key: entry for key, entry in found.items() if _is_entry(entry)}
        return {}

    def _of_device(self, name: str) -> str:
        return f"{self._device}, {name}"


def _is_entry(entry: Any) -> bool:
    """Whether an entry has the form that `took` writes."""
    seconds = {name: value for name, value in entry.items() if name.endswith("_s")}
    return "compiled_s" in seconds and all(isinstance(value, int | float) for value in seconds.values())


def _short(directory: str) -> str:
    """A path with ~ for the home directory."""
    with contextlib.suppress(ValueError, RuntimeError):
        return f"~/{Path(directory).relative_to(Path.home())}"
    return directory


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f" (about {seconds:.0f} s)"
