"""Runs one candidate program and says how it went; `sandbox.run` starts it, in a folder of its own.

Standard library only, in isolated mode.  Limits are set, and doors are closed, before the candidate's code is
run: processor time, memory, file sizes; on Linux a network namespace without interfaces and a Landlock
ruleset that allows no writing outside the folder, where the kernel has them; and everywhere an audit hook,
which cannot be taken off again from Python, against network, processes, signals and files outside the folder.
It guards against a model's accidents, not against an attacker.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
from typing import Any

# Audit events that begin like this: never allowed, and allowed for paths in the candidate's folder.
FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn",
    "os.kill", "os.startfile", "pty.", "signal.", "urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.",
    "mmap.", "resource.", "os.chroot", "os.set_inheritable", "code.__new__",
)  # fmt: skip
PATHS = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.link",
    "os.symlink", "os.utime", "os.chflags", "os.lockf", "os.setxattr", "os.removexattr", "os.mkfifo",
    "os.mknod", "shutil.", "tempfile.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION = 1  # a flag: which version of Landlock the kernel has
# Bits of rights that are new in each version.
LANDLOCK_WRITES = {1: (1, 4, 5, 6, 7, 8, 9, 10, 11, 12), 2: (13,), 3: (14,)}


def main() -> None:
    """Read the task from standard input, run it, write the outcome to what was standard output."""
    task = json.load(sys.stdin)
    report, silence = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    sys.dont_write_bytecode = True
    folder = os.path.realpath(os.getcwd())
    limit(task["seconds"], task["memory_bytes"], task["file_bytes"])
    isolate(folder)
    outcome = {"nonce": task["nonce"], "passed": True, "reason": "passed"}
    sys.addaudithook(guard(folder))
    try:
        exec(compile(task["program"], "candidate.py", "exec"), {"__name__": "candidate"})  # noqa: S102
    except BaseException as error:  # noqa: BLE001 - SystemExit is no way to pass
        outcome |= {"passed": False, "reason": f"{type(error).__name__}: {error}"[:200]}
    os.write(report, json.dumps(outcome).encode())
    os._exit(0)


def limit(seconds: float, memory_bytes: int, file_bytes: int) -> None:
    """Processor seconds, bytes of memory, bytes of a file; no core dumps, few open files."""
    whole = int(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: whole,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS, and refuses it
            resource.setrlimit(kind, (most, most))


def isolate(folder: str) -> None:
    """On Linux: no network, no writing outside `folder`, as far as the kernel lets a user ask for it."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    writes = sum(1 << bit for since, bits in LANDLOCK_WRITES.items() if since <= version for bit in bits)
    rules = libc.syscall(LANDLOCK_CREATE, ctypes.byref(ctypes.c_uint64(writes)), ctypes.c_size_t(8), 0)
    if version < 1 or rules < 0:
        return
    folder_fd = os.open(folder, os.O_RDONLY)
    beneath = writes.to_bytes(8, sys.byteorder) + folder_fd.to_bytes(4, sys.byteorder)
    libc.syscall(LANDLOCK_ADD, rules, 1, beneath, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall(LANDLOCK_RESTRICT, rules, 0)


def guard(folder: str) -> Any:
    """An audit hook that raises PermissionError for what a candidate has no need of."""

    def is_inside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        whole = os.path.realpath(os.fsdecode(path))
        return whole == folder or whole.startswith(folder + os.sep) or whole == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            allowed = not (flags or 0) & WRITING or is_inside(path)
        elif event.startswith(PATHS):
            allowed = all(is_inside(a) for a in arguments if isinstance(a, str | bytes | os.PathLike))
        else:
            allowed = not event.startswith(FORBIDDEN)
        if not allowed:
            raise PermissionError(f"{event} is not allowed here")

    return hook


if __name__ == "__main__":
    main()
