import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.fleet import random_fleet, read_servers

FLEET = random_fleet(3)
SERVERS = "server,flops,memory_bytes\nedge-1, 2e10 ,\nedge-2,8e9,4e9\n"
LINKS = """client,server,uplink_bps,downlink_bps
0,edge-1,1e6,2e6
1,edge-2,3e6,4e6
2,edge-1,5e6,6e6
2,edge-2,7e6,8e6
"""
NINE, THREE = LINKS.replace("1,edge-2", "9,edge-2"), LINKS.replace("1,edge-2", "1,edge-3")


def read(tmp_path, servers=SERVERS, links=None):
    paths = []
    for name, text in (("servers.csv", servers), ("links.csv", links)):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            paths.append(tmp_path / name)
    return read_servers(paths[0], FLEET, *paths[1:])


def test_servers_without_links_have_the_rates_of_the_fleet(tmp_path):
    servers = read(tmp_path)
    assert servers.server.tolist() == ["edge-1", "edge-2"]
    assert servers.flops.tolist() == [2e10, 8e9]
    assert servers.memory_bytes.tolist() == [np.inf, 4e9]
    for name in ("uplink_bps", "downlink_bps"):
        np.testing.assert_array_equal(getattr(servers, name), np.stack([getattr(FLEET, name)] * 2, axis=1))
    assert read(tmp_path, "flops,server\n1,a\n").memory_bytes.tolist() == [np.inf]


def test_links_are_those_of_their_lines_and_none_elsewhere(tmp_path):
    servers = read(tmp_path, links=LINKS)
    assert servers.uplink_bps.tolist() == [[1e6, 0], [0, 3e6], [5e6, 7e6]]
    assert servers.downlink_bps.tolist() == [[2e6, 0], [0, 4e6], [6e6, 8e6]]


@pytest.mark.parametrize(
    ("servers", "links", "words"),
    [
        ("server\na\n", None, r"servers.csv:1: column flops: missing; must have server,flops"),
        ("server,flops,gpu\n", None, r"servers.csv:1: column 'gpu': must be one of server, flops"),
        ("server,flops,flops\n", None, r"servers.csv:1: column flops: must occur once"),
        ("server,flops\n", None, r"servers.csv:2: no servers; must have one line for each"),
        ("", None, r"servers.csv:1: column server: missing"),
        ("server,flops\na,1\n\na,2\n", None, r"servers.csv:4: column server: 'a': is also on line 2"),
        ("server,flops\na\n", None, r"servers.csv:2: column flops: missing; a line has 2 cells"),
        ("server,flops\n ,1\n", None, r"servers.csv:2: column server: '': must be 1 to 64 printable"),
        ("server,flops\na,0\n", None, r"servers.csv:2: server a: column flops: '0': must be a positive"),
        ("server,flops\na,1_0\n", None, r"servers.csv:2: server a: column flops: '1_0': must be a positive"),
        ("server,flops\na,inf\n", None, r"servers.csv:2: server a: column flops: 'inf': must be a positive"),
        ("server,flops,memory_bytes\na,1,-2\n", None, r"servers.csv:2: server a: column memory_bytes: '-2'"),
        (b"server,flops\n\xff,1\n", None, r"servers.csv:2: byte 0xff: must be UTF-8"),
        (SERVERS, NINE, r"links.csv:3: column client: '9': must be a client of the"),
        (SERVERS, THREE, r"links.csv:3: client 1: column server: 'edge-3': must be a"),
        (SERVERS, LINKS + "0,edge-1,1,1\n", r"links.csv:6: client 0 and server edge-1 are also on line 2"),
        (SERVERS, LINKS.replace("1e6", "0"), r"links.csv:2: client 0: column uplink_bps: '0': must be a"),
        (SERVERS, LINKS.replace("1,edge-2,3e6,4e6\n", ""), r"links.csv: client 1 has no line; must have"),
    ],
)  # fmt: skip
def test_the_first_fault_is_named_with_its_line(tmp_path, servers, links, words):
    with pytest.raises(BadInput, match=words) as caught:
        read(tmp_path, servers, links)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none.csv: No such file or directory; give the path of a CSV file"):
        read_servers(tmp_path / "none.csv", FLEET)
