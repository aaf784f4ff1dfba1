"""The shell text that scripts are made of, with places for what differs (`str.format`)."""

from __future__ import annotations

# The trap on ERR names the line of the set-up that failed: one of the script itself (depth 1) or of the
# site file (depth 2), but no command within a file that these read.
SHELL = """\
if [ -z "${{SLURM_JOB_ID:-}}" ]; then
  echo "this is a job for SLURM: sbatch $0" >&2
  exit 2
fi

# A task is named by its array: the number of its own may be that of the whole array.
job=$SLURM_JOB_ID
if [ -n "${{SLURM_ARRAY_TASK_ID:-}}" ]; then job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID; fi
say() {{ printf '[%(%F %T)T job %s] %s\n' -1 "$job" "$*"; }}

{signals}
featstore= again= stopped= signalled= timer=
stop() {{
  signalled=1 stopped=1
{stop}
}}
out_of_time() {{ scontrol show job "$job" --oneliner 2>/dev/null | grep -q ' Reason=TimeLimit '; }}
{traps}

# What this cluster needs first. A line that fails ends the job, and is named.
words=("$@")
set --
setup_failed() {{
  if [ "$1" -gt {depth} ]; then return; fi
  say "a line of the set-up has failed with code $2: $3"
  exit 1
}}
trap 'setup_failed "${{#BASH_SOURCE[@]}}" "$?" "$BASH_COMMAND"' ERR
{setup}
trap - ERR
set +e -u
set -- ${{words[@]+"${{words[@]}}"}}

{environment}
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then say "restart $SLURM_RESTART_COUNT"; fi
code=143
if [ -z "$stopped" ]; then
{command}
  featstore=$!
  while :; do  # a signal ends the waiting, not featstore
    signalled=
    wait "$featstore"
    code=$?
    if [ -z "$signalled" ]; then break; fi
  done
fi

trap '' USR1 USR2 TERM INT  # a job that is put back is told to stop
if [ -n "$timer" ]; then kill "$timer" 2>/dev/null; fi
{at_end}exit "$code"
"""
AT_END = """\
if [ -n "$again" ] && {interrupted}; then put_back "stopped in time"; fi
"""
SIGNALS = """\
# USR1 comes when the time is nearly up, TERM when the job is cancelled, preempted or out of time.
# featstore is told to save; only a job that ran out of time goes back into the queue by itself."""
# `back`: whether the job was put back, or is not to be; empty while neither is decided.
TRAPS = """\
back=
put_back() {{
  if [ -n "$back" ]; then return; fi
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ]; then
    back=no
    say "$1, but not put back into the queue: restarted {restarts} times already"
  elif scontrol requeue "$job"; then
    back=yes
    say "$1, and back in the queue"
  else
    say "$1, but SLURM did not take it back into the queue: submit the same again"
  fi
}}
# featstore may look at the signal late, and at its end a job is no longer put back: so shortly before,
# this script does it while featstore runs.
last_moment() {{
  nap=
  trap 'if [ -n "$nap" ]; then kill "$nap"; fi; exit' TERM
  sleep {net} &
  nap=$!
  wait "$nap"
  kill -USR2 "$$"
}}
out_soon() {{
  say "the time is nearly up: saving"
  again=1
  if [ -z "$timer" ]; then last_moment & timer=$!; fi
  stop
}}
told_to_stop() {{
  say "told to stop: saving"
  stop
  if out_of_time; then again=1; else again= back=${{back:-no}}; fi
}}
trap out_soon USR1
trap 'signalled=1; put_back "not stopped in time (what was saved last counts)"' USR2
trap told_to_stop TERM INT"""
# A step that saves nothing would begin anew, and run out of time again.
SIGNALS_SMALL = "# TERM comes when the job is cancelled, preempted or out of time."
TRAPS_SMALL = """\
told_to_stop() {{
  say "told to stop"
  if out_of_time; then
    say "the time was too short, and {step} would begin anew: submit it with more (slurm.time)"
  fi
  stop
}}
trap told_to_stop TERM INT"""
SITE = """\
site=${FEATSTORE_SITE:-$SLURM_SUBMIT_DIR/featstore_site.sh}
case $site in /*) ;; *) site=$SLURM_SUBMIT_DIR/$site ;; esac
if [ -n "${FEATSTORE_SITE:-}" ] || [ -e "$site" ]; then . "$site"; fi"""
ONE_PROCESS = 'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"'
ON_NODES = """\
# One torchrun a node, by srun. They meet at the first node, by SLURM's own address of it: its name need
# not mean anything on the others.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" --oneliner | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
port=$((20000 + SLURM_JOB_ID % 10000))
processes={processes}
cores=$((${{SLURM_CPUS_PER_TASK:-1}} / processes))
export OMP_NUM_THREADS=$((cores > 0 ? cores : 1))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}  # for saving; where torch is too old to know it, 30 s
# torchrun reads --node-rank from PET_NODE_RANK.
on_nodes=(srun --ntasks-per-node=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}"
  --kill-on-bad-exit=0 --wait=0  # the first process saves and writes when the others have ended
  bash -c 'PET_NODE_RANK=$SLURM_NODEID exec "$@"' bash)
rendezvous=(--nnodes "${{SLURM_JOB_NUM_NODES:-1}}" --nproc-per-node "$processes"
  --master-addr "${{address:-$first}}" --master-port "$port")"""
