import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.fleet import random_fleet, read_traces

FLEET = random_fleet(2)
TRACES = """client,round,uplink_bps,flops
0,mon,1e6,
1,mon,2e6,5e9
1,tue, 3e6 ,6e9
0,tue,4e6,7e9
"""


def read(tmp_path, text):
    path = tmp_path / "rates.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_traces(path, FLEET)


def test_rates_are_those_of_their_lines_and_of_the_fleet_elsewhere(tmp_path):
    traces = read(tmp_path, TRACES)
    assert len(traces) == 2
    assert traces.round.tolist() == ["mon", "tue"]
    assert traces.uplink_bps.tolist() == [[1e6, 2e6], [4e6, 3e6]]
    assert traces.flops.tolist() == [[FLEET.flops[0], 5e9], [7e9, 6e9]]
    np.testing.assert_array_equal(traces.downlink_bps, [FLEET.downlink_bps] * 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"rates.csv:1: column round: missing; must have round,client"),
        ("round,client\n0,0\n", r"rates.csv:1: must have a column of flops, uplink_bps, downlink_bps"),
        ("round,client,flops\n", r"rates.csv:2: no rounds; must have a line for each client and round"),
        ("round,client,ghz\n", r"rates.csv:1: column 'ghz': must be one of round, client, flops"),
        (TRACES.replace("0,tue", "7,tue"), r"rates.csv:5: column client: '7': must be a client of the fleet"),
        (TRACES.replace("0,tue", "1,tue"), r"rates.csv:5: client 1 in round tue is also on line 4"),
        (
            TRACES.replace("4e6", "0"),
            r"rates.csv:5: client 0: column uplink_bps: '0': must be a",
        ),
        (
            TRACES.replace("4e6", "nan"),
            r"rates.csv:5: client 0: column uplink_bps: 'nan': must be",
        ),
        (
            TRACES.replace("0,tue", "0,"),
            r"rates.csv:5: client 0: column round: '': must be 1 to 64",
        ),
        (TRACES.replace("0,tue,4e6,7e9\n", ""), r"rates.csv: client 0 has no line in round tue"),
        (TRACES + "0,wed\n", r"rates.csv:6: column uplink_bps: missing; a line has 4 cells"),
        (b"round,client,flops\n\xff,0,1\n", r"rates.csv:2: byte 0xff: must be UTF-8"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, words):
    with pytest.raises(BadInput, match=words):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none.csv: No such file or directory; give the path of a CSV file"):
        read_traces(tmp_path / "none.csv", FLEET)
