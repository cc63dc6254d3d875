#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-3%4
#SBATCH --comment=packcli:0a1b2c3d.5
#SBATCH --constraint='a800&ib'
#SBATCH --cpus-per-task=64
#SBATCH --dependency=afterok:1003_0,afterok:1004_0
#SBATCH --exclude='node[3,7]'
#SBATCH --exclusive
#SBATCH --gres=gpu:a800:8
#SBATCH --job-name=example-train-0a1b2c3d.5
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/slurm/0a1b2c3d/array-5/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=1440

# setup
trap : TERM  # preemption: the tasks hear of it too, and what they leave is looked at below
export NOTE='it'"'"'s "quoted"; & # not run'
module load cuda/12.4
ulimit -c 0
set +e
/opt/packcli/bin/python -u -m packcli.launch.job begin /shared/runs/slurm/0a1b2c3d/array-5 || exit "$?"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/slurm/0a1b2c3d/array-5/%A_%a_%t_log.out --open-mode=append --wait=300 --cpus-per-task=64 /opt/packcli/bin/python -u -m packcli.launch.job run /shared/runs/slurm/0a1b2c3d/array-5


# teardown
code=$?
job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
state=$(squeue --noheader --job "$job" --format %T)
/opt/packcli/bin/python -u -m packcli.launch.job after /shared/runs/slurm/0a1b2c3d/array-5 "$code" "$state"
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
