"""Replacements for a cluster's programs that start jobs, written into a separate directory."""

import os
import sys
from pathlib import Path

# Starts $TASKS processes with the variables of SLURM's srun, forwards SIGTERM, exits with the highest code.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
count = int(os.environ["TASKS"])
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | dict(
        SLURM_STEP_NODELIST="127.0.0.1", SLURM_STEP_NUM_NODES="1", SLURM_NTASKS=str(count),
        SLURM_PROCID=str(task), SLURM_LOCALID=str(task),
    ))
    for task in range(count)
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
# Runs a copy of the script, as SLURM does, and runs it again after each requeue; $RECORD.job has its process.
SBATCH = f"""#!{sys.executable}
import os, pathlib, shutil, subprocess, sys
record = pathlib.Path(os.environ["RECORD"])
script = shutil.copy(sys.argv[1], record.with_suffix(".script"))
while True:
    job = subprocess.Popen(
        [script, *sys.argv[2:]], env=os.environ | dict(SLURM_SUBMIT_DIR=os.getcwd()), start_new_session=True
    )
    record.with_suffix(".job").write_text(str(job.pid))
    code = job.wait()
    if not record.exists() or record.read_text() != f"requeue {{os.environ['SLURM_JOB_ID']}}\\n":
        sys.exit(code)
    record.unlink()
"""
RECORDED = '#!/bin/sh\necho "$@" >> "$RECORD"\n'
PROGRAMS = {"sbatch": SBATCH, "srun": SRUN, "scontrol": RECORDED, "gcloud": RECORDED}


def variables(directory: Path, job: int = 4711, tasks: int = 1) -> dict[str, str]:
    """The environment of a job with `tasks` tasks and replaced programs; `record` has their arguments."""
    programs = directory / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORD": str(directory / "record"),
        "SLURM_JOB_ID": str(job),
        "TASKS": str(tasks),
    }
