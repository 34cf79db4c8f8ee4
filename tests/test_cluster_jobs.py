"""The job files of launch/cluster: lint, schema, and runs of the scripts with replaced cluster programs."""

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import stand_ins
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "launch" / "cluster"


@pytest.fixture
def environment(tmp_path):
    """The environment of a batch job with one task."""
    return os.environ | stand_ins.variables(tmp_path) | {"SLURM_SUBMIT_DIR": str(ROOT)}


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_clean(script):
    assert os.access(script, os.X_OK)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def kubernetes_objects():
    return list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_kubernetes_objects_follow_their_schema(version):
    service, job = kubernetes_objects()
    for one in (service, job):
        kubernetes_validate.validate(one, version, strict=True)
    job["spec"]["completionmode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def test_the_pods_of_the_job_find_each_other():
    service, job = kubernetes_objects()
    pod = job["spec"]["template"]["spec"]
    flags = dict(flag[2:].split("=", 1) for flag in pod["containers"][0]["args"])
    host, port = flags["coordinator_address"].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert int(flags["num_processes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]


@pytest.mark.parametrize(
    ("code", "requeued"), [(75, True), (130, True), (0, False), (2, False), (3, False), (134, False)]
)
def test_slurm_requeues_what_was_interrupted(code, requeued, environment, tmp_path):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\nexit {code}\n')
    program.chmod(0o755)
    done = subprocess.run(
        [CLUSTER / "slurm.sh", "--workdir=a b"], env=environment | {"PYTHON": str(program)}, check=False
    )
    assert done.returncode == code
    assert (tmp_path / "given").read_text() == "-u -m launch.train --workdir=a b\n"
    record = tmp_path / "record"
    assert (record.read_text() if record.exists() else "") == ("requeue 4711\n" if requeued else "")


def test_tpu_hosts_are_given_the_flags_as_they_are(environment, tmp_path):
    slice_of = {"TPU": "pod", "ZONE": "us-east5-a", "REPOSITORY": "https://example.com/sfl_jax.git"}
    given = ["--workdir=/mnt/a b", "--dataset=set/config"]
    done = subprocess.run([CLUSTER / "tpu_pod.sh", *given], env=environment | slice_of, check=False)
    assert done.returncode == 0
    *_, last = (tmp_path / "record").read_text().splitlines()
    assert last.startswith(
        "compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all --command=cd sfl_jax && "
    )
    assert last.endswith(r"launch.train --workdir=/mnt/a\ b --dataset=set/config")
    done = subprocess.run(
        [CLUSTER / "tpu_pod.sh"],
        env=environment | slice_of | {"TPU": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "the name of the slice" in done.stderr
