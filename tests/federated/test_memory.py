"""What a machine and its control groups leave for a round: trees of files like the kernel's."""

import pytest

from sfl_jax.federated.memory import host_bytes

GIB = 2**30
PHYSICAL = "MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\n"  # 8 GiB
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def v2(limit, used, inactive=0, active=0):
    return {
        "memory.max": limit,
        "memory.current": used,
        "memory.stat": f"anon 5\nfile 17\ninactive_anon 3\ninactive_file {inactive}\nactive_file {active}\n",
    }


def v1(limit, used, inactive=0, active=0):
    """A group's own numbers. The files with `total_` add those of the groups inside."""
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        "memory.stat": (
            f"inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
        ),
    }


def tree(root, group, directories, meminfo=PHYSICAL):
    files = {f"{where}/{name}": text for where, own in directories.items() for name, text in own.items()}
    files |= {"proc/meminfo": meminfo, "proc/self/cgroup": group}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("mount", "group", "files"), [(V2, "0::/", v2), (V1, "4:memory:/\n0::/", v1), (V1, "4:cpu,memory:/", v1)]
)
def test_the_page_cache_is_not_memory_that_somebody_needs(tmp_path, mount, group, files):
    """A container that has read its dataset, once or often, has as much memory as before."""
    for inactive, active in ((3 * GIB, 0), (0, 3 * GIB), (GIB, 2 * GIB)):
        root = tree(tmp_path, group, {mount: files(4 * GIB, 4 * GIB - 5, inactive, active)})
        assert host_bytes(root) == 3 * GIB + 5


@pytest.mark.parametrize(
    ("mount", "group", "files"), [(V2, "0::/slice/job/step", v2), (V1, "9:memory:/slice/job/step", v1)]
)
@pytest.mark.parametrize("narrow", ["", "/slice", "/slice/job", "/slice/job/step"])
def test_no_group_above_may_be_exceeded(tmp_path, mount, group, files, narrow):
    groups = {
        f"{mount}{name}": files(6 * GIB, GIB) for name in ("", "/slice", "/slice/job", "/slice/job/step")
    }
    root = tree(tmp_path, group, {**groups, f"{mount}{narrow}": files(3 * GIB, 2 * GIB)})
    assert host_bytes(root) == GIB


@pytest.mark.parametrize(("mount", "files", "word"), [(V2, v2, "0::"), (V1, v1, "7:memory:")])
@pytest.mark.parametrize("path", ["/docker/0123", "/../other", "/"])
def test_a_container_sees_its_own_group_at_the_mount(tmp_path, mount, files, word, path):
    assert host_bytes(tree(tmp_path, f"{word}{path}", {mount: files(2 * GIB, GIB)})) == GIB


def test_the_group_of_another_controller_says_nothing(tmp_path):
    groups = {f"{V1}/a": v1(3 * GIB, 0), f"{V1}/b": v1(2 * GIB, 0)}
    assert host_bytes(tree(tmp_path, "3:memory:/a\n2:cpuset:/b\n1:name=systemd:/b\n0::/b", groups)) == 3 * GIB


def test_a_group_is_slowed_down_from_its_high_mark(tmp_path):
    root = tree(tmp_path, "0::/", {V2: v2(6 * GIB, GIB) | {"memory.high": 3 * GIB}})
    assert host_bytes(root) == 2 * GIB


@pytest.mark.parametrize(
    "files", [{}, {V2: v2("max", GIB)}, {V1: v1(2**63 - 4096, GIB)}, {V2: {"memory.max": 20 * GIB}}]
)
def test_without_limits_it_is_what_the_machine_has(tmp_path, files):
    assert host_bytes(tree(tmp_path, "0::/", files)) == 8 * GIB


def test_never_less_than_nothing_and_never_more_than_there_is(tmp_path):
    assert host_bytes(tree(tmp_path, "0::/", {V2: v2(GIB, 2 * GIB)})) == 0
    assert host_bytes(tree(tmp_path, "0::/", {V2: v2(GIB, GIB // 2, inactive=GIB)})) == GIB
    assert host_bytes(tmp_path / "no such place") > 0
