#!/bin/bash

# Parameters
#SBATCH --array=0-3%4
#SBATCH --comment=packcli:0a1b2c3d.6
#SBATCH --cpus-per-task=8
#SBATCH --dependency=aftercorr:1005
#SBATCH --gpus-per-node=1
#SBATCH --job-name=example-eval-0a1b2c3d.6
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=64G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/slurm/0a1b2c3d/array-6/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=480

# setup
trap : TERM  # preemption: the tasks hear of it too, and what they leave is looked at below
export NCCL_DEBUG=WARN
set +e
/opt/packcli/bin/python -u -m packcli.launch.job begin /shared/runs/slurm/0a1b2c3d/array-6 || exit "$?"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/slurm/0a1b2c3d/array-6/%A_%a_%t_log.out --open-mode=append --wait=300 --cpus-per-task=8 /opt/packcli/bin/python -u -m packcli.launch.job run /shared/runs/slurm/0a1b2c3d/array-6


# teardown
code=$?
job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
state=$(squeue --noheader --job "$job" --format %T)
/opt/packcli/bin/python -u -m packcli.launch.job after /shared/runs/slurm/0a1b2c3d/array-6 "$code" "$state"
code=$?
if [ "$code" = 75 ]; then
    for pause in 0 5 15 30; do
        sleep "$pause"
        state=$(squeue --noheader --job "$job" --format %T) || continue
        [ "$state" = RUNNING ] || break
        scontrol requeue "$job" && sleep 60 && break  # SLURM ends this script
    done
fi
exit "$code"
