#!/usr/bin/env bash
# One run on all hosts of a running Cloud TPU pod slice. JAX finds the hosts and chips itself.
#   TPU=my-slice ZONE=us-east5-a REPOSITORY=https://example.com/sfl_jax.git \
#     launch/cluster/tpu_pod.sh --preset=mnist --workdir=/mnt/runs/mnist
# The workdir must be a place that every host sees (Filestore, or a bucket mounted with gcsfuse).
#
# If a spot slice is taken away, the run saves its round and exits 75. Give the same command again when the slice, or
# another one of any size, is up; the run goes on from there.
#
# Change nothing here. Set the three variables and the flags.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}" "${REPOSITORY:?where to clone sfl_jax from}"

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_every_host "test -d sfl_jax || git clone $(printf %q "$REPOSITORY") sfl_jax
cd sfl_jax && python3 -m venv .venv && .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'"

flags=$(printf ' %q' "$@")
on_every_host "cd sfl_jax && .venv/bin/python -u -m launch.train$flags"
