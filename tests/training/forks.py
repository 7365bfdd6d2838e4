"""Runs python/train.py in forks of a process that has imported all modules, to save the import time in tests.

    python -m tests.training.forks

Reads a JSON list of jobs per line, runs them concurrently, and answers with a JSON list of exit statuses (negative: the
signal that ended the job). A job has "arguments" and "output" (file), and optionally "env", "file_size_limit" (bytes)
and "kill": [FILE, LINES, SECONDS], to kill it SECONDS after FILE has LINES lines.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback

import lightning_fabric  # noqa: F401
import torch

import train
from deco_kernels.training import loop  # noqa: F401


def start(job: dict) -> int:
    """Forks; the child runs the job and never returns."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.environ.update(job.get("env", {}))
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        torch.set_num_threads(1)
        limit_files(job)
        status = train.main(job["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def limit_files(job: dict) -> None:
    """Limits the size of files that the child may write, like a full disk."""
    if job.get("file_size_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"],) * 2)


def finish(pid: int, job: dict) -> int:
    """Waits for a child, kills it if its job requires, and returns its exit status."""
    if "kill" in job:
        path, lines, seconds = job["kill"]
        while not os.path.exists(path) or len(open(path).readlines()) < lines:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        jobs = json.loads(line)
        pids = [start(job) for job in jobs]
        answers.write(json.dumps([finish(pid, job) for pid, job in zip(pids, jobs, strict=True)]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
