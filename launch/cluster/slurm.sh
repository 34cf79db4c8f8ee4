#!/usr/bin/env bash
# One run on the GPUs of several nodes, on a cluster with SLURM; JAX learns the rest from srun's variables.
#   sbatch launch/cluster/slurm.sh --preset=mnist --workdir=/shared/runs/mnist
#   sbatch --nodes=1 --ntasks-per-node=1 launch/cluster/slurm.sh ...      the same on one GPU
# The workdir must be on a file system that every node sees.
#
# Preempted, or out of time, the run saves itself and exits 75, or 130 before there is anything to save: the job
# goes back into the queue and goes on from there. Any other code ends the job; after the failure of a node SLURM
# requeues it by itself.
#
# Change: nodes, tasks of a node (one for each GPU), cores, time; the partition and account if yours needs them.
#SBATCH --job-name=sfl_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

# Under sbatch this file is a copy elsewhere, so the checkout is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}" || exit 2
PYTHON=${PYTHON:-.venv/bin/python}

trap : TERM # meant for the tasks, which get it too; without this the shell would end before it can requeue
srun "$PYTHON" -u -m launch.train "$@"
code=$?
if [ "$code" -eq 75 ] || [ "$code" -eq 130 ]; then
    echo "job $SLURM_JOB_ID was interrupted; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
