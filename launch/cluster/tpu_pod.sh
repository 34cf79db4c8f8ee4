#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU pod slice that is up; JAX finds the hosts and the chips by itself.
#   TPU=my-slice ZONE=us-east5-a REPOSITORY=https://example.com/sfl_jax.git \
#     launch/cluster/tpu_pod.sh --preset=mnist --workdir=/mnt/runs/mnist
# The workdir must be a place that every host sees (Filestore, or a bucket mounted with gcsfuse).
#
# A spot slice that is taken away saves itself and exits 75. The same command goes on from there, once the slice
# (or another one, of any size) is up again.
#
# Change: nothing here; the three variables and the flags say it all.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}" "${REPOSITORY:?where to clone sfl_jax from}"

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_every_host "test -d sfl_jax || git clone $(printf %q "$REPOSITORY") sfl_jax
cd sfl_jax && python3 -m venv .venv && .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'"

flags=$(printf ' %q' "$@")
on_every_host "cd sfl_jax && .venv/bin/python -u -m launch.train$flags"
