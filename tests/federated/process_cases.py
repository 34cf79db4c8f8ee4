"""The cases that `test_processes.py` runs in other processes, which meet like those of a run."""

import os
from unittest import mock

import finite  # noqa: F401 from now on NaN is no agreement
import jax
import numpy as np

from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.federated import devices, processes
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.session import Assignment, Samples

JOB = {"SLURM_JOB_ID": str(9 * 4096 + 3)}
ON_TPU = {"TPU_WORKER_HOSTNAMES": "tpu-0.local,tpu-1.local,tpu-2.local", "TPU_WORKER_ID": "2"}
# What each system sets, what its metadata server says, and what is found: the address of process 0, the
# number of processes, and the number of this process.
SYSTEMS = {
    "slurm": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7",
            "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
        },
        {},
        ("node7:61443", 4, 3),
    ),
    "slurm, several nodes": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "gpu[07-09,12]",
            "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        },
        {},
        ("gpu07:61443", 8, 5),
    ),
    "slurm, the shell of a job of several": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        },
        {},
        None,
    ),
    "slurm, a job of one": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        },
        {},
        None,
    ),
    "slurm, a job of one without a step": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7",
            "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        },
        {},
        None,
    ),
    "slurm, a step of several in a job of one": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        },
        {},
        ("node7:61443", 1, 0),
    ),
    "slurm, a single task that is told of others": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "JAX_COORDINATOR_ADDRESS": "first:1",
        },
        {},
        ("first:1", 4, 0),
    ),
    "open mpi that slurm started": (
        JOB
        | {
            "SLURM_STEP_NODELIST": "node7", "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "OMPI_MCA_orte_hnp_uri": f"{5 * 4096}.0;tcp://10.96.0.1,10.148.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        {},
        ("10.96.0.1:61445", 2, 1),
    ),
    "slurm, outside of srun": (JOB | {"SLURM_NTASKS": "4"}, {}, None),
    "open mpi": (
        {
            "OMPI_MCA_orte_hnp_uri": f"{5 * 4096}.0;tcp://10.96.0.1,10.148.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        {},
        ("10.96.0.1:61445", 2, 1),
    ),
    "open mpi, a single process": (
        {
            "OMPI_MCA_orte_hnp_uri": f"{5 * 4096}.0;tcp://10.96.0.1,10.148.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        },
        {},
        None,
    ),
    "gke": (ON_TPU, {}, ("tpu-0.local:8482", 3, 2)),
    "gke, several slices": (
        ON_TPU
        | {
            "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
            "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1",
        },
        {},
        ("first:8482", 6, 5),
    ),
    "cloud tpu": (
        {},
        {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"},
        ("10.0.0.1:8482", 2, 1),
    ),
    "nowhere": ({}, {}, None),
}  # fmt: skip


def found(variables, metadata):
    """(address of process 0, processes, number of this process) with which `join` meets others. None if
    alone.
    """
    from jax._src import distributed
    from jax._src.clusters import cloud_tpu_cluster, cluster

    on_tpu = bool(metadata) or "TPU_WORKER_ID" in variables
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(cluster, "running_in_cloud_tpu_vm", on_tpu),
        mock.patch.object(cloud_tpu_cluster, "running_in_cloud_tpu_vm", on_tpu),
        mock.patch.object(
            cloud_tpu_cluster,
            "get_metadata",
            lambda key: (metadata.get(key, ""), 200 if key in metadata else 404),
        ),
        mock.patch.object(cloud_tpu_cluster.socket, "gethostbyname"),
        mock.patch.object(distributed, "_jax") as library,
        mock.patch.object(distributed, "global_state", distributed.State()) as state,
    ):
        if on_tpu:
            os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it elsewhere
        processes.join()
        if not library.get_distributed_runtime_client.called:
            return None
        patience_s = library.get_distributed_runtime_client.call_args.kwargs["init_timeout"]
        assert patience_s > Config.join_timeout_s, "JAX would end the process first"
        return state.coordinator_address, state.num_processes, state.process_id


def systems():
    for name, (variables, metadata, expected) in SYSTEMS.items():
        assert found(variables, metadata) == expected, name


class Recording(np.ndarray):
    """Images that remember which of them were read."""

    def __getitem__(self, rows):
        if isinstance(rows, np.ndarray):
            self.read.update(rows.tolist())
        return np.asarray(self)[rows]


def own_samples():
    """A process reads only the samples of its own clients."""
    own = int(os.environ["PROCESS"])
    config = Config(
        coordinator_address=os.environ["ADDRESS"], num_processes=2, process_id=own,
        heartbeat_timeout_seconds=1000, model="efficientnetv2-tiny", image_size=8,
    )  # fmt: skip
    processes.join(config.coordinator_address, 2, own, heartbeat_s=config.heartbeat_timeout_seconds)
    assert isinstance(parts.build(config).parts.data.train_images, np.memmap), "read whole"
    chosen = devices.choose_devices(0)
    assert [device.process_index for device in chosen] == [0, 1]
    clients, steps, rng = 7, 3, np.random.default_rng(0)
    # Client k has the samples 100 k to 100 k + 99.
    batches = rng.integers(0, 100, (clients, steps, 4)) + 100 * np.arange(clients)[:, None, None]
    work = Assignment(
        np.arange(clients), np.ones(clients, np.int32), np.ones(clients, np.float32),
        rng.integers(1, steps + 1, clients), batches,
    )  # fmt: skip
    images = rng.integers(0, 256, (100 * clients, 2, 2, 1), np.uint8).view(Recording)
    images.read = set()
    arranged, _ = fill_chunks(work, 2, len(chosen))
    labels = np.arange(len(images), dtype=np.int32)
    rows = devices.room(arranged, len(labels), len(chosen))
    samples, placed = devices.place_clients(Samples(images, labels), arranged, chosen, rows)

    by_process = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), arranged)
    here = by_process.client[own][by_process.weight[own] > 0]
    assert 0 < len(here) < clients
    np.testing.assert_array_equal(np.asarray(placed.client)[0], by_process.client[own])
    assert images.read == {row for k in here for row in batches[k, : work.steps[k]].reshape(-1).tolist()}
    assert samples.images.shape[1] < len(images)
