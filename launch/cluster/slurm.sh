#!/usr/bin/env bash
# One run on the GPUs of several nodes of a SLURM cluster. JAX reads the rest from srun's variables.
#   sbatch launch/cluster/slurm.sh --preset=mnist --workdir=/shared/runs/mnist
#   sbatch --nodes=1 --ntasks-per-node=1 launch/cluster/slurm.sh ...      the same on one GPU
# The workdir must be on a file system that every node sees.
#
# If the run is preempted or its time is over, it saves its round and exits 75, or 130 if nothing is saved yet. The job
# then goes back into the queue, and the run goes on from there. Any other code ends the job. After a node failure,
# SLURM itself requeues the job.
#
# Change: nodes, tasks of a node (one for each GPU), cores, time; partition and account, if your cluster needs them.
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

# sbatch runs a copy of this file, so the checkout is the directory from which the job was submitted.
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}" || exit 2
PYTHON=${PYTHON:-.venv/bin/python}

trap : TERM # the tasks get it too; without this trap the shell would end before it can requeue
srun "$PYTHON" -u -m launch.train "$@"
code=$?
if [ "$code" -eq 75 ] || [ "$code" -eq 130 ]; then
    echo "job $SLURM_JOB_ID was interrupted; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
