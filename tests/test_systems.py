"""Systems that lack names of POSIX: the source asks before it uses one, and a run without them goes well."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchcache

PACKAGE = Path(torchcache.__file__).parent

# What Windows lacks, some of it macOS as well.
MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
NAMES = {
    "os": """
        O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC PRIO_PROCESS SEEK_DATA SEEK_HOLE
        WEXITSTATUS WIFEXITED WIFSIGNALED WNOHANG chown chroot confstr copy_file_range ctermid eventfd fchdir fchmod
        fchown fdatasync fork forkpty fpathconf fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpgrp
        getpriority getrandom getresuid getsid getuid getxattr initgroups killpg lchown listxattr lockf major
        makedev memfd_create minor mkfifo mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate
        posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork removexattr sched_getaffinity
        sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setpgid setpriority setsid setuid
        setxattr statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 waitid writev
    """,
    "signal": """
        ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 SIGXFSZ alarm
        getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigwait
    """,
    "mmap": """
        MADV_DONTNEED MADV_FREE MADV_HUGEPAGE MADV_WILLNEED MAP_ANON MAP_ANONYMOUS MAP_NORESERVE MAP_POPULATE
        MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE
    """,
    "time": "clock_getres clock_gettime pthread_getcpuclockid tzset",
    "select": "epoll kqueue poll",
    "socket": "AF_UNIX",
}
LACKING = {module: frozenset(names.split()) for module, names in NAMES.items()}

# Uses in functions that are called only where the name is there.
ASKED_ELSEWHERE = {
    "store.file: os.preadv": "scatter is called where SCATTERS",
    "store.slab: mmap.MADV_DONTNEED": "there are memories to give back where slabs are lazy",
    "store.slab: mmap.MAP_PRIVATE": "slabs are lazy on POSIX alone",
    "store.slab: mmap.MAP_ANONYMOUS": "slabs are lazy on POSIX alone",
}


def unguarded(tree):
    """The names that a file uses without having asked for them, as ``os.fork`` or ``fcntl``."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used = sorted(MODULES & {alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            used = [node.module] if node.module in MODULES else []
            used += sorted(f"{node.module}.{a.name}" for a in node.names if a.name in LACKING.get(node.module, ()))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            used = [f"{module}.{name}"] if module in MODULES or name in LACKING.get(module, ()) else []
        else:
            continue
        if used and not is_guarded(node, parents):
            yield from used


def is_guarded(node, parents):
    """Whether something around or before ``node`` asks for the system, or minds that a name is not there."""
    while node in parents:
        child, node = node, parents[node]
        if isinstance(node, (ast.If, ast.IfExp)) and asks(node.test) and child is not node.test:
            return True
        if isinstance(node, ast.Try) and child in node.body and any(map(minds, node.handlers)):
            return True
        if isinstance(node, ast.With) and any(asks(item.context_expr) for item in node.items):
            return True
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list) and child in block:
                before = block[: block.index(child)]
                if any(isinstance(one, ast.If) and asks(one.test) and leaves(one.body) for one in before):
                    return True
    return False


def asks(expression):
    texts = (
        "os.name",
        "sys.platform",
        "hasattr(os,",
        "fcntl is None",
        "suppress(ImportError)",
        "suppress(AttributeError)",
    )
    return any(text in ast.unparse(expression) for text in texts)


def minds(handler):
    return handler.type is not None and any(
        name in ast.unparse(handler.type) for name in ("ImportError", "AttributeError", "NameError")
    )


def leaves(body):
    return isinstance(body[-1], (ast.Return, ast.Raise))


def test_names_that_other_systems_lack_are_asked_for():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found |= {f"{name}: {used}" for used in unguarded(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == ASKED_ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import os\nos.fork()", ["os.fork"]),
        ("import fcntl", ["fcntl"]),
        ("from os import getuid, path", ["os.getuid"]),
        ("from pwd import getpwuid", ["pwd"]),
        ("def f():\n    x = 1\n    return signal.SIGALRM", ["signal.SIGALRM"]),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
        ("def f():\n    if fcntl is None:\n        raise OSError\n    fcntl.flock(1, 2)", []),
        ("def f():\n    fcntl.flock(1, 2)\n    if fcntl is None:\n        return", ["fcntl.flock"]),
        ("try:\n    import fcntl\nexcept OSError:\n    fcntl = None", ["fcntl"]),
        ("with contextlib.suppress(ImportError):\n    import grp", []),
        ("if hasattr(os, 'fork'):\n    os.fork()", []),
        ("x = os.getuid() if os.name == 'posix' else 0", []),
        ("def f():\n    if os.name != 'posix':\n        return 0\n    return os.getuid()", []),
        ("def f():\n    if os.name != 'posix':\n        pass\n    return os.getuid()", ["os.getuid"]),
        ("os.getpid(), os.path.join, x.fork()", []),
    ],
)
def test_every_use_is_seen(text, found):
    assert list(unguarded(ast.parse(text))) == found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not tell which files are open")
def test_a_run_goes_well_without_them_and_where_open_files_stay(tmp_path):
    program = Path(__file__).with_name("elsewhere.py")
    lacking = json.dumps({"modules": [*MODULES], "names": {module: [*names] for module, names in LACKING.items()}})
    done = subprocess.run([sys.executable, str(program), str(tmp_path), lacking], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
