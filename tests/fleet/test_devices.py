"""Device files: written and read back, and refused where something is missing or 0."""

import json

import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.fleet import Device, check_devices, read_device, write_device

OWN = Device("net at 8x8x1, 10 classes", 8, ("stem", "head"), np.array([0.1, 0.2]), np.array([0.2, 1 / 3]))


def test_written_and_read_back_nothing_is_lost(tmp_path):
    write_device(tmp_path / "d.json", OWN)
    again = read_device(tmp_path / "d.json")
    assert (again.network, again.batch_size, again.units) == (OWN.network, 8, ("stem", "head"))
    assert again.forward_s.tolist() == OWN.forward_s.tolist()
    assert again.backward_s.tolist() == OWN.backward_s.tolist()
    assert again.path == str(tmp_path / "d.json")
    check_devices([again], ("stem", "head"), 8, OWN.network)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file/d\.json: Not a directory; give a path"):
        write_device(tmp_path / "file" / "d.json", OWN)


BAD = {
    'must be a device file, with "format"': lambda file: file.pop("format"),
    "network: missing": lambda file: file.pop("network"),
    "batch_size=0: must be an integer, at least 1": lambda file: file.update(batch_size=0),
    "units: missing": lambda file: file.update(units=[]),
    "unit 2: must have a name": lambda file: file["units"][1].pop("unit"),
    "unit head: backward_s: missing; must be a number above 0": lambda file: file["units"][1].pop(
        "backward_s"
    ),
    "unit stem: forward_s=0: must be a number above 0": lambda file: file["units"][0].update(forward_s=0),
    "unit stem: forward_s=nan: must be a number above 0": lambda file: file["units"][0].update(
        forward_s=float("nan")
    ),
}


@pytest.mark.parametrize(("words", "change"), BAD.items(), ids=BAD)
def test_a_wrong_file_is_refused(tmp_path, words, change):
    write_device(tmp_path / "d.json", OWN)
    content = json.loads((tmp_path / "d.json").read_text())
    change(content)
    (tmp_path / "d.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"d.json: {words}"):
        read_device(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("units", "batch_size", "network", "words"),
    [
        (("stem", "head"), 16, None, "batch_size=8, and batch_size=16 is asked for; measure it with that"),
        (("stem",), 8, None, "has 2 units; must have the 1 of the network"),
        (("stem", "end"), 8, None, "its units have other names"),
        (
            ("stem", "head"),
            8,
            "net at 9x9x1, 10 classes",
            "was measured with net at 8x8x1, 10 classes; must be",
        ),
    ],
)
def test_what_was_measured_with_another_network_or_batch_is_refused(units, batch_size, network, words):
    with pytest.raises(BadInput, match=words):
        check_devices([OWN], units, batch_size, network)
