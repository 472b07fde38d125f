#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice. Run it again to continue: see docs/pods.md.
#   launch/tpu_pod.sh TPU_NAME ZONE RUN_DIR [options of python -m experiments.classification]
set -euo pipefail
name=$1 zone=$2 run_dir=$3
shift 3

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive=$(mktemp --suffix=.tar)
trap 'rm "$archive"' EXIT
git archive --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name":drconv_jax.tar --zone="$zone" --worker=all
# The machines' own Python is older than 3.11.
on_all_workers "mkdir -p drconv_jax && cd drconv_jax && tar -xf ../drconv_jax.tar &&
  python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.12 &&
  python3 -m uv pip install --quiet --editable '.[experiments,tpu]'"
on_all_workers "cd drconv_jax && .venv/bin/python -m experiments.classification \
  --run-dir $(printf '%q' "$run_dir") --auto-resume $(printf '%q ' "$@")"
