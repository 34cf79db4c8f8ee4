import dataclasses
import os
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfl_jax.digests import digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.fleet import Device, Fleet, random_fleet, read_fleet, write_device, write_fleet
from sfl_jax.fleet.files import _read_exactly, _read_fast

HEADER = "client,flops,uplink_bps,downlink_bps,memory_bytes"
GOOD = f"""{HEADER},samples
pi,1e10,5e6,2e7,1073741824,600
phone,2.5e11,10000000,4e7,4294967296,12
"""


def check_equal(one, other):
    assert one.columns().keys() == other.columns().keys()
    for name, values in one.columns().items():
        assert values.dtype.kind == other.columns()[name].dtype.kind
        np.testing.assert_array_equal(values, other.columns()[name])


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "fleet.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def reorder(text):
    return "\n".join(",".join(reversed(line.split(","))) for line in text.splitlines())


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.rstrip(),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\n\n"),
        "\ufeff" + GOOD,
        reorder(GOOD),
        GOOD.replace("pi", '"pi"').replace("5e6", '"5e6"'),
        GOOD.replace("5e6", " 5000000.0 ").replace("600", "+600"),
        GOOD.replace(",", ", "),
        GOOD.replace(",", " ,\t").replace("pi", " pi "),
        GOOD.replace(",", ", ").replace("phone", ' "phone"').replace("5e6", '"5e6" '),
    ],
)
def test_reads_the_same_fleet_however_it_is_written(file, text):
    path = file(text)
    fleet = read_fleet(path)
    check_equal(_read_exactly(path, path.read_bytes()), fleet)
    assert len(fleet) == 2
    assert fleet.client.tolist() == ["pi", "phone"]
    assert fleet.flops.tolist() == [1e10, 2.5e11]
    assert fleet.uplink_bps.tolist() == [5e6, 1e7]
    assert fleet.downlink_bps.tolist() == [2e7, 4e7]
    assert fleet.memory_bytes.tolist() == [2**30, 2**32]
    assert fleet.samples is not None
    assert fleet.samples.tolist() == [600, 12]
    assert fleet.samples.dtype == np.int64
    assert fleet.distance_m is None


@pytest.mark.parametrize("name", ["München", 'client, the "first"', "a b", "-", "1", "nan", "x" * 64, "手机"])
def test_names_are_taken_as_they_are(tmp_path, name):
    fleet = random_fleet(2, seed=0)
    fleet = Fleet(**(fleet.columns() | {"client": np.array([name, "other"])}))
    write_fleet(tmp_path / "fleet.csv", fleet)
    check_equal(read_fleet(tmp_path / "fleet.csv"), fleet)


positive = st.floats(min_value=5e-324, max_value=1.7e308)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), clients=st.integers(1, 5))
def test_written_and_read_back_nothing_is_lost(tmp_path_factory, data, clients):
    def column(values):
        return np.array(data.draw(st.lists(values, min_size=clients, max_size=clients)))

    floats = ["flops", "uplink_bps", "downlink_bps", "memory_bytes"]
    floats += data.draw(
        st.lists(st.sampled_from(["cycles_per_s", "kappa", "energy_j", "distance_m"]), unique=True)
    )
    columns = {name: column(positive) for name in floats}
    if data.draw(st.booleans()):
        columns["samples"] = column(st.integers(1, 2**63 - 1)).astype(np.int64)
    fleet = Fleet(client=np.arange(clients).astype(str), **columns)
    path = tmp_path_factory.mktemp("fleet") / "fleet.csv"
    write_fleet(path, fleet)
    check_equal(read_fleet(path), fleet)
    check_equal(_read_exactly(path, path.read_bytes()), fleet)


@pytest.mark.parametrize("largest", [2.0**53 - 1, 2.0**53])
def test_whole_numbers_are_written_without_a_point(tmp_path, largest):
    columns = random_fleet(2, seed=0).columns() | {"flops": np.array([2e11, largest])}
    path = tmp_path / "fleet.csv"
    write_fleet(path, Fleet(**columns))
    assert (b",200000000000," in path.read_bytes()) == (largest < 2.0**53)
    check_equal(read_fleet(path), Fleet(**columns))


def cell(line, column, value):
    """GOOD with one cell replaced; lines count from 1."""
    rows = [row.split(",") for row in GOOD.splitlines()]
    rows[line - 1][rows[0].index(column)] = value
    return "\n".join(map(",".join, rows))


NUMBERS = ("flops", "uplink_bps", "downlink_bps", "memory_bytes")
NO_NUMBERS = (
    "abc",
    "",
    "-1",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "1e999",
    "1_0",
    "1 0",
    "0x10",
    "5 Mbit",
    "٣",
    "1\0",
    "None",
)
RULE = {"memory_bytes": "a number, 0 or more", "samples": "a positive integer"}


@pytest.mark.parametrize("line", [2, 3])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((column, value) for column in NUMBERS for value in NO_NUMBERS),
        *((column, value) for column in NUMBERS[:3] for value in ("0", "-0.0", "1e-999")),
        *(("samples", value) for value in (*NO_NUMBERS, "0", "1.5", "3.0", "1e3", str(2**63), "9" * 5000)),
    ],
)
def test_a_bad_number_is_named(file, line, column, value):
    path = file(cell(line, column, value))
    with pytest.raises(BadInput) as caught:
        read_fleet(path)
    shown = repr(value if len(value) <= 40 else value[:39] + "…")
    rule = RULE.get(column, "a positive number")
    who = {2: "pi", 3: "phone"}[line]
    assert str(caught.value) == f"{path}:{line}: client {who}: column {column}: {shown}: must be {rule}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["cycles_per_s", "kappa", "transmit_w", "energy_j", "distance_m"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-0.1", "", "x", "0"])
def test_the_columns_that_may_be_missing_hold_numbers_too(file, column, value):
    text = GOOD.replace("\n", ",2\n").replace("samples,2", f"samples,{column}")
    path = file(text.replace("600,2", f"600,{value}"))
    may_be_zero = column in ("kappa", "transmit_w", "energy_j")
    if value == "0" and may_be_zero:
        assert getattr(read_fleet(path), column).tolist() == [0, 2]
        return
    with pytest.raises(BadInput) as caught:
        read_fleet(path)
    rule = "a number, 0 or more" if may_be_zero else "a positive number"
    assert str(caught.value) == f"{path}:2: client pi: column {column}: {value!r}: must be {rule}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: column client: missing; must have client,flops"),
        ("\n\n", ":2: column client: missing"),
        (b"\0" * 10, ":1: column '"),
        (HEADER, ":2: no clients; must have one line for each"),
        (HEADER + "\n\n", ":3: no clients"),
        (GOOD.replace("flops", "gflops"), ":1: column 'gflops': must be one of client, flops, uplink_bps,"),
        (GOOD.replace("flops", "fl ops"), ":1: column 'fl ops': must be one of"),
        (GOOD.replace(",", ",note,city,"), ":1: columns 'note', 'city', 'note', 'city', "),
        (GOOD.replace(",", ";"), ":1: cells are separated by semicolons; use commas, and points"),
        (GOOD.replace(",", "\t"), ":1: cells are separated by tabs; use commas"),
        ("sep=;\n" + GOOD.replace(",", ";"), ":1: cells are separated by semicolons"),
        (GOOD.replace("phone", " pi "), ":3: column client: 'pi': is also on line 2"),
        (cell(3, "client", "  "), ":3: column client: '': must be 1 to 64 printable characters"),
        (GOOD.replace("flops", "samples"), ":1: column samples: must occur once"),
        (GOOD.replace("samples", ""), ":1: column '': must be one of"),
        (GOOD.replace("memory_bytes", "energy_j"), ":1: column memory_bytes: missing"),
        ("1,2,3\n4,5,6\n", ":1: columns '1', '2', '3': must be one of"),
        (GOOD.replace(",600", ""), ":2: column samples: missing; a line has 6 cells"),
        (GOOD.replace(",4294967296,12", ""), ":3: column memory_bytes: missing"),
        (GOOD.replace(",600", ",600,7"), ":2: cell 7: '7': has no column"),
        (GOOD + "tail,1,1,1,1,1,,\n", ":4: cell 7: '': has no column"),
        (GOOD.replace("phone", "pi"), ":3: column client: 'pi': is also on line 2"),
        (cell(3, "client", ""), ":3: column client: '': must be 1 to 64 printable characters"),
        (cell(2, "client", "x" * 65), f":2: column client: '{'x' * 39}…': must be 1 to 64"),
        (cell(2, "client", "a\0b"), r":2: column client: 'a\x00b': must be 1 to 64"),
        (cell(2, "client", '"a\nb"'), r":3: column client: 'a\nb': must be 1 to 64"),
        (cell(2, "client", "\x1b[31m"), r":2: column client: '\x1b[31m': must be"),
        (GOOD.replace("phone", '"phone'), ":3: column flops: missing; a line has 6 cells"),
        (cell(2, "client", "x" * 200_000), ":2: not CSV (field larger than field limit"),
        (GOOD.encode().replace(b"phone", b"ph\xffone"), ":3: byte 0xff: must be UTF-8"),
        (GOOD.encode().replace(b"flops", b"fl\xffops"), ":1: byte 0xff: must be UTF-8"),
        (GOOD.encode("utf-16"), ":1: byte 0xff: must be UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_by_line_and_column(file, content, message):
    path = file(content)
    with pytest.raises(BadInput) as caught:
        read_fleet(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "Is a directory"),
        ("none.csv", "No such file or directory"),
        ("fleet.csv/below", "Not a directory"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_no_such_file(file, tmp_path, name, message):
    file(GOOD)
    with pytest.raises(BadInput, match=rf"{message}.*; give the path of a fleet\.csv"):
        read_fleet(os.path.join(tmp_path, name))


def test_a_path_that_cannot_be_written_is_refused_and_a_failed_write_leaves_the_old_file(file, tmp_path):
    path, fleet = file(GOOD), random_fleet(3, seed=0)
    with pytest.raises(BadInput, match="Not a directory; give a path that can be written"):
        write_fleet(path / "below", fleet)
    with pytest.raises(BadInput, match="Is a directory"):
        write_fleet(tmp_path, fleet)
    uneven = Fleet(**(fleet.columns() | {"client": fleet.client.astype(object)}))
    uneven.client[1] = "\ud800"  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_fleet(path, uneven)
    assert path.read_text() == GOOD
    assert os.listdir(tmp_path) == ["fleet.csv"]


def outcome(read):
    try:
        return read()
    except BadInput:
        return None


pieces = st.sampled_from(
    [
        *GOOD.split(","),
        ",",
        "\n",
        "\r",
        '"',
        " ",
        "0",
        "-",
        "1",
        "e",
        ".",
        "nan",
        "é",
        "\0",
        "\ufeff",
        HEADER,
        "NULL",
    ]
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(pieces, max_size=12).map("".join), at=st.integers(0, len(GOOD)), cut=st.integers(0, 9))
@example(text='""', at=0, cut=0)
@example(text='"a"b', at=len(HEADER) + 9, cut=2)
def test_what_arrow_accepts_is_what_the_rules_say(tmp_path_factory, text, at, cut):
    """The fast reader may leave a file to the exact reader, but never reads another fleet from it."""
    data = (GOOD[:at] + text + GOOD[at + cut :]).encode()
    fast = _read_fast(data)
    if fast is not None:
        exact = outcome(lambda: _read_exactly(tmp_path_factory.getbasetemp() / "fleet.csv", data))
        assert exact is not None
        check_equal(fast, exact)


def test_the_usual_file_goes_the_fast_way(tmp_path):
    path, fleet = tmp_path / "fleet.csv", random_fleet(1000, seed=0).with_samples(np.arange(1, 1001))
    write_fleet(path, fleet)
    fast = _read_fast(path.read_bytes())
    assert fast is not None
    check_equal(fast, fleet)


@pytest.mark.slow
def test_a_million_clients_in_seconds(tmp_path):
    path, fleet = tmp_path / "fleet.csv", random_fleet(1_000_000, seed=0)
    write_fleet(path, fleet)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        back = read_fleet(path)
        seconds.append(time.perf_counter() - begin)
        check_equal(back, fleet)
    assert min(seconds) < 3


DEVICES = """client,flops,device,slowdown,uplink_bps,downlink_bps,memory_bytes,samples,rtt_s
pi,,pi.json,,5e6,2e7,1e9,600,0.05
phone,2.5e11,,,1e7,4e7,4e9,12,0.1
old-pi,,pi.json,1.5,5e6,2e7,1e9,60,0.05
"""


@pytest.fixture
def devices(tmp_path):
    own = Device("net", 8, ("stem", "head"), np.array([0.1, 0.2]), np.array([0.2, 0.3]))
    write_device(tmp_path / "pi.json", own)

    def write(text):
        (tmp_path / "fleet.csv").write_text(text)
        return tmp_path / "fleet.csv"

    return write


def test_clients_can_name_a_device_instead_of_flops(devices, tmp_path):
    fleet = read_fleet(devices(DEVICES))
    assert fleet.flops.tolist() == [np.inf, 2.5e11, np.inf]
    assert fleet.device.tolist() == ["pi.json", "", "pi.json"]
    assert fleet.slowdown.tolist() == [1.0, 1.0, 1.5]
    assert fleet.rtt_s.tolist() == [0.05, 0.1, 0.05]
    assert list(fleet.devices) == ["pi.json"]
    assert fleet.devices["pi.json"].backward_s.tolist() == [0.2, 0.3]
    assert fleet.take([2]).device.tolist() == ["pi.json"]
    assert fleet.take([2]).devices == fleet.devices
    (tmp_path / "below").mkdir()
    for name in ("copy.csv", "below/copy.csv"):
        write_fleet(tmp_path / name, fleet)
        again = read_fleet(tmp_path / name)
        for column in ("client", "flops", "slowdown", "rtt_s", "samples"):
            assert getattr(again, column).tolist() == getattr(fleet, column).tolist()
        own = again.devices[again.device.tolist()[0]]
        assert own.forward_s.tolist() == [0.1, 0.2]
    other = dataclasses.replace(fleet.devices["pi.json"], forward_s=np.array([0.1, 0.3]))
    changed = dataclasses.replace(fleet, devices={"pi.json": other})
    assert digest_of_columns(changed.contents()) != digest_of_columns(fleet.contents())
    no_flops = read_fleet(devices(DEVICES.replace("flops,", "", 1).replace("pi,,", "pi,").replace(
        "phone,2.5e11,,", "phone,pi.json,")))  # fmt: skip
    assert np.isinf(no_flops.flops).all()


BAD_DEVICES = {
    "fleet.csv:2: columns flops and device: both are empty": ("pi,,pi.json,,", "pi,,,,"),
    "fleet.csv:2: columns flops and device: both are given": ("pi,,pi.json,,", "pi,1e9,pi.json,,"),
    "fleet.csv:3: client phone: column slowdown: '2': needs a device": ("2.5e11,,,", "2.5e11,,2,"),
    "fleet.csv:4: client old-pi: column slowdown: '0': must be a positive number": ("1.5", "0"),
    "fleet.csv:2: client pi: column rtt_s: '0': must be a positive number": ("600,0.05", "600,0"),
    "fleet.csv:4: column device: .*none.json: No such file": ("old-pi,,pi.json", "old-pi,,none.json"),
    "fleet.csv:4: column device: .*fleet.csv: must be a device file; it is no JSON": (
        "old-pi,,pi.json", "old-pi,,fleet.csv",
    ),
    "fleet.csv:1: column slowdown: needs the column device": ("flops,device", "flops,kappa"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "change"), BAD_DEVICES.items(), ids=BAD_DEVICES)
def test_a_wrong_device_is_refused_with_its_line(devices, words, change):
    with pytest.raises(BadInput, match=words):
        read_fleet(devices(DEVICES.replace(*change, 1)))
