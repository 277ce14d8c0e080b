"""Training and every command on one hostile directory, in a child that is watched: time, memory, what lies outside."""

import contextlib
import gc
import hashlib
import io
import json
import os
import resource
import select
import shutil
import signal
import stat
import time
import traceback

import grammar
import loaded
from trained import Run

import torchcache
from torchcache.cli.main import main

SMALL, LARGE = 40, 2
# Beyond an honest directory's. Processor time: the machine may be busy with something else.
MORE_SECONDS, MORE_BYTES = 2.0, 500_000_000
# What these are asked to write anew takes as long as the bytes that are there take, honest or not.
REWRITING, BYTES_PER_SECOND = ("prune --max-size --unused", "verify", "clear --yes"), 100_000_000
HUNG_SECONDS = 60.0
# What is longer has been made long on purpose, and is known by its size and times.
MOST_HASHED = 100_000_000


class BrokenPromiseError(AssertionError):
    """What must not happen to whoever opens a directory from anybody."""


def honest(directory):
    """Fill the directory that others are made from."""
    Run(directory).steps(SMALL, LARGE)
    loaded.epochs(directory)
    torchcache.flush()


def steps(directory, work):
    """The steps in order, by name."""
    yield "training", lambda: _train(directory)
    yield "training through the loader", lambda: loaded.epochs(directory) and None
    yield "training when it is full", lambda: _train_when_full(directory)
    for name, *more in (
        ["info"],
        ["info", "--json"],
        ["stats"],
        ["doctor"],
        ["verify", "--no-repair"],
        ["export", str(work / "out.safetensors"), "--region", "Stretch"],
        ["merge", str(work / "joined")],
        ["prune", "--older-than", "1d", "--dry-run"],
        ["prune", "--max-size", "100KB", "--unused-since", "2001-01-01"],
        ["verify"],
        ["clear", "--yes"],
    ):
        yield (
            " ".join([name, *(one for one in more if one.startswith("-"))]),
            lambda name=name, more=more: _command(name, str(directory), *more),
        )
    yield "training again", lambda: _train(directory)


def _train(directory):
    run = Run(directory)
    run.steps(SMALL + 10, LARGE + 1)
    torchcache.flush()


def _train_when_full(directory):
    """With other weights, so that rows must give way."""
    gc.collect()  # the models of the step before hold theirs
    held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    run = Run(directory, max_persistent_cache_size=held)
    for model in (*run.models.values(), *run.twins.values()):
        model.weight.data.mul_(2)
    run.steps(SMALL, LARGE)
    torchcache.flush()


def _command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    said = out.getvalue() + err.getvalue()
    if code not in (0, 1, 2) or "Traceback" in said:
        raise BrokenPromiseError(f"ended with {code}: {said[-2000:]}")
    if any(not sign.isprintable() for sign in said.replace("\n", "")):
        raise BrokenPromiseError(f"signs for terminals: {said[-2000:]!r}")
    if "--json" not in arguments and "all sound" in said.splitlines() and code:
        raise BrokenPromiseError(f"a forged line: {said[-2000:]}")


def endure(source, folder, seed, limits=None):
    """Make a directory from ``source`` in ``folder`` and take every step; seconds by step and the most bytes.

    Parameters
    ----------
    source : Path
        An honest directory.
    folder : Path
        A new one is made there.
    seed : int or None
        Of the grammar; ``None`` leaves the directory honest.
    limits : dict or None
        What an honest directory took.

    Raises
    ------
    BrokenPromiseError
        Told with the rules and the step.
    """
    cache, outside, work = folder / "cache", folder / "outside", folder / "work"
    work.mkdir(parents=True)
    shutil.copytree(source, cache)
    grammar.victims(outside)
    rules = _harm(cache, outside, seed) if seed is not None else []
    before = fingerprint(outside)
    try:
        took = in_a_child(lambda tell: _take_steps(cache, work, limits, tell))
        after = fingerprint(outside)
        if after != before:
            raise BrokenPromiseError(f"outside: {sorted(before.items() ^ after.items())}")
        if limits and took["bytes"] > limits["bytes"] + MORE_BYTES:
            raise BrokenPromiseError(f"took {took['bytes'] - limits['bytes']:,} bytes more than an honest directory")
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"seed {seed}, {rules}: {error}") from None
    return took


def _harm(cache, outside, seed):
    """Make the directory hostile, in a child: what one rule made can stop the next."""
    try:
        return in_a_child(lambda tell: grammar.make(cache, outside, seed, tell), seconds=10.0)
    except BrokenPromiseError as error:
        return [str(error)]


def fingerprint(folder):
    """All that can be seen of a tree: names, kinds, modes, times and contents."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        look = os.lstat(path)
        content = _content(path) if stat.S_ISREG(look.st_mode) and look.st_size <= MOST_HASHED else ""
        found[str(path)] = (look.st_mode, look.st_mtime_ns, look.st_size, content)
    return found


def _content(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _take_steps(cache, work, limits, tell):
    took = {}
    for name, step in steps(cache, work):
        tell(name)
        more = MORE_SECONDS + (_database_bytes(cache) / BYTES_PER_SECOND if name.startswith(REWRITING) else 0)
        start = time.process_time()
        step()
        took[name] = time.process_time() - start
        if limits and took[name] > limits[name] + more:
            raise BrokenPromiseError(f"{took[name]:.1f} s beside {limits[name]:.1f} s of an honest directory")
    took["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return took


def _database_bytes(cache):
    """Bytes of the database on disk; a hole has none."""
    try:
        return 512 * os.lstat(cache / "rows-1" / "cache.db").st_blocks
    except OSError:
        return 0


def in_a_child(function, seconds=HUNG_SECONDS):
    """What ``function`` returns in a fork, which is killed when it says nothing for so many seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        gc.freeze()  # to look for garbage among all that the parent has takes as long as a training
        try:
            with os.fdopen(writing, "w") as pipe:
                try:
                    result = function(lambda name: print(json.dumps({"step": name}), file=pipe, flush=True))
                    print(json.dumps({"took": result}), file=pipe, flush=True)
                except BaseException as error:
                    told = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
                    print(json.dumps({"error": told}), file=pipe, flush=True)
        finally:
            os._exit(0)
    os.close(writing)
    step, end = "starting", time.monotonic() + seconds
    with os.fdopen(reading, "rb") as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            line = pipe.readline()
            if not line:
                break
            said = json.loads(line)
            if "took" in said:
                os.waitpid(child, 0)
                return said["took"]
            if "error" in said:
                os.waitpid(child, 0)
                raise BrokenPromiseError(f"{step}: {said['error']}")
            step, end = said["step"], time.monotonic() + seconds
        else:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    raise BrokenPromiseError(f"{step}: the process was ended ({status}), or hung for {seconds:g} s")
