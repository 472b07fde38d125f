#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, a process for every GPU: see docs/pods.md.
#   sbatch --nodes=4 launch/slurm.sh RUN_DIR [options of python -m experiments.classification]
#SBATCH --job-name=drconv
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
run_dir=$1
shift
srun --kill-on-bad-exit=0 .venv/bin/python -m experiments.classification \
  --run-dir "$run_dir" --auto-resume "$@"
status=$?
if [ "$status" -eq 75 ]; then # stopped by SIGTERM, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
