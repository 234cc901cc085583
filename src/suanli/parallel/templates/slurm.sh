#!/bin/bash
# suanli trains on {{ nodes }} node(s), each with {{ processes_per_node }} process(es).
#
# Submit this file:                     sbatch FILE
# Options of sbatch override those here: sbatch --partition=NAME --time=8:00:00 FILE
# Working directory, data and run must be on storage that all nodes share.
#
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node={{ processes_per_node }}
#SBATCH --cpus-per-task={{ cpus_per_process }}
{% if gpus_per_node %}
#SBATCH --gpus-per-node={{ gpus_per_node }}
{% endif %}
#SBATCH --requeue
#SBATCH --signal=TERM@{{ grace_s }}
#SBATCH --open-mode=append
#SBATCH --output={{ name }}-%j.out

restarts={{ restarts }}  # at most

cd -- {{ folder }} || exit 3

# {{ grace_s }} s before the time limit, and on preemption, every process gets SIGTERM and saves a checkpoint. The same
# command then resumes from the newest checkpoint. Where a restart can't help (wrong options, damaged data, a full disk)
# a process reports the error in this file. Exit codes are not enough: srun kills that process along with the others.
export SUANLI_VERDICT="$PWD/.suanli-$SLURM_JOB_ID.json"
rm -f -- "$SUANLI_VERDICT"

srun --kill-on-bad-exit=1 --wait={{ wait_s }} --cpus-per-task={{ cpus_per_process }} {{ python }} -m suanli train
{%- for word in arguments %} {{ word }}{% endfor %}

code=$?

if [ -e "$SUANLI_VERDICT" ]; then
  verdict=$(cat -- "$SUANLI_VERDICT")
  rm -f -- "$SUANLI_VERDICT"
  case $verdict in
    *'"kind": "Interrupted"'*) code=130 ;;
    *) printf '%s\n' "$verdict"; exit 1 ;;
  esac
fi
case $code in
  0 | 2 | 3 | 5) exit $code ;;  # 4 without that file: a process lost its connection to the others
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]; then
  echo "Exit code $code, after $restarts restarts."
  exit $code
fi
echo "Exit code $code: the job is put back into the queue."
scontrol requeue "$SLURM_JOB_ID" || exit $code
