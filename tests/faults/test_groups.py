"""A directory for a team: members of its group share rows both ways, and nobody else gets anything."""

import os
import stat
from pathlib import Path

import endurance
import pytest
import torch
from trained import Run

from torchcache.cli.main import main
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier

posix = pytest.mark.skipif(os.name != "posix", reason="modes of files")
two_users = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be two users")

GROUP, FIRST, SECOND = 54000, 54001, 54002
ALL = 54  # rows of ``train``: 50 small ones and 4 that are files


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that all users can enter."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o011)
        if path == Path("/tmp"):
            break
    Run(tmp_path / "warm").steps(50, 4)  # what a first call imports
    return tmp_path


def as_user(user, mask, function):
    """What a function returns in a child of another user, a member of the group."""

    def child(tell):
        os.setgroups([GROUP])
        os.setgid(user)
        os.setuid(user)
        os.umask(mask)
        return function()

    return endurance.in_a_child(child)


_held = []


def train(directory, small=50, large=4, **options):
    """Rows that disk answered, and failures."""
    torch.set_num_threads(1)
    run = Run(directory, **options)
    _held.append(run)  # as in a process that is killed: nothing is closed
    run.steps(small, large)
    return [run.count("disk_hits"), run.count("disk_errors")]


def modes(directory):
    """Permissions of folders and of files below a directory."""
    folders, files = set(), set()
    for path in directory.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        (folders if path.is_dir() else files).add(mode)
    return folders, files


def teams(place, mode=0o2770):
    directory = place / "team"
    directory.mkdir()
    os.chown(directory, 0, GROUP)
    directory.chmod(mode)
    return directory


@two_users
@pytest.mark.parametrize("masks", [(0o002, 0o002), (0o002, 0o022), (0o007, 0o027)])
@pytest.mark.parametrize("mode", [0o2770, 0o2775])
def test_two_members_share_rows_both_ways(place, masks, mode):
    directory = teams(place, mode)
    assert as_user(FIRST, masks[0], lambda: train(directory)) == [0, 0]
    assert as_user(SECOND, masks[1], lambda: train(directory, 100, 8)) == [ALL, 0]
    assert as_user(FIRST, masks[0], lambda: train(directory, 150, 12)) == [2 * ALL, 0]
    assert as_user(SECOND, masks[1], lambda: train(directory, 150, 12)) == [3 * ALL, 0]
    folders, files = modes(directory)
    assert all(mode & 0o007 == 0 for mode in folders | files)
    assert all(mode & stat.S_ISGID for mode in folders)
    assert {path.stat().st_gid for path in directory.rglob("*")} == {GROUP}


@two_users
@pytest.mark.parametrize("masks", [(0o022, 0o022), (0o077, 0o022)])
@pytest.mark.parametrize("state", ["new", "for its owner alone", "open, with files for their owner alone"])
def test_an_option_gives_a_directory_to_its_group_whatever_the_umask(place, masks, state):
    parent = teams(place, 0o2775)
    directory = parent / "cache"
    stored = 0
    if state != "new":
        assert as_user(FIRST, 0o022, lambda: train(directory)) == [0, 0]
        assert modes(directory) == ({0o2700}, {0o600})
        (directory / "notes.txt").write_text("the user's own")
        (directory / "notes.txt").chmod(0o600)
        os.chown(directory / "notes.txt", FIRST, FIRST)
        os.link(directory / "notes.txt", directory / "rows-1" / "more")
        stored = ALL
    if state.startswith("open"):
        directory.chmod(0o2770)
    assert as_user(FIRST, masks[0], lambda: train(directory, group=True)) == [stored, 0]
    assert as_user(SECOND, masks[1], lambda: train(directory, 100, 8, group=True)) == [ALL, 0]
    assert as_user(FIRST, masks[0], lambda: train(directory, 100, 8, group=True)) == [2 * ALL, 0]
    if state != "new":
        assert stat.S_IMODE((directory / "notes.txt").stat().st_mode) == 0o600
        (directory / "rows-1" / "more").unlink()
        (directory / "notes.txt").unlink()
    assert modes(directory.parent) == ({0o2770}, {0o660})
    assert {path.stat().st_gid for path in directory.rglob("*")} == {GROUP}


@two_users
def test_a_member_makes_room_by_rows_of_another(place):
    directory = teams(place)
    limit = 900_000
    options = {"max_persistent_cache_size": limit}
    as_user(FIRST, 0o002, lambda: train(directory, 50, 4, **options))

    def other():
        run = Run(directory, **options)
        for model, twin in zip(run.models.values(), run.twins.values(), strict=True):
            for one in (model, twin):
                one.weight.data.mul_(3)
        run.steps(50, 4)
        return run.count("disk_errors")

    assert as_user(SECOND, 0o002, other) == 0
    assert as_user(FIRST, 0o002, lambda: train(directory, 50, 4, **options))[0] < ALL
    assert len([*directory.rglob("*.val")]) <= 4
    assert main(["verify", str(directory), "--no-repair"]) == 0


@two_users
def test_a_folder_that_a_member_keeps_to_himself_is_left_alone(place):
    directory = teams(place)
    as_user(FIRST, 0o002, lambda: train(directory))
    for number in range(0, 256, 4):
        (directory / "rows-1" / f"{number:02x}").mkdir(0o755, exist_ok=True)

    def others():
        blobs = [(number.to_bytes(32, "big"), bytes(200_000)) for number in range(40)]
        stored = [DiskTier(directory).write([entry], Region("0" * 32, ""))[0] for entry in blobs]
        return sum(stored)

    assert as_user(SECOND, 0o002, others) == 40


@two_users
def test_files_that_a_umask_keeps_from_the_group_are_said_and_explained(place, warnings, capsys):
    directory = teams(place)
    (counts, said) = as_user(FIRST, 0o077, lambda: [train(directory), warnings])
    assert counts == [0, 0]
    assert len(said) == 1
    assert "group=True" in said[0]
    (hits, errors), said = as_user(SECOND, 0o002, lambda: [train(directory), warnings])
    assert (hits, errors > 0) == (0, True)
    assert len(said) == 1
    assert "torchcache doctor" in said[0]
    assert main(["doctor", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "shared with the group" in said
    assert "rows-1/cache.db" in said
    assert "chmod -R g+rwX" in said


@two_users
@pytest.mark.parametrize("mode", [0o2770, 0o2775])
def test_what_others_can_write_is_set_right_or_not_written(place, mode):
    directory = teams(place, mode)
    as_user(FIRST, 0o002, lambda: train(directory))
    database = directory / "rows-1" / "cache.db"
    database.chmod(0o666)
    # It is not his to change: where others can get at it, he reads.
    reached = mode & 0o001
    hits, errors = as_user(SECOND, 0o002, lambda: train(directory, 100, 4))
    assert (hits, errors > 0) == (ALL, bool(reached))
    assert as_user(FIRST, 0o002, lambda: train(directory, 100, 4)) == [ALL if reached else ALL + 50, 0]
    assert stat.S_IMODE(database.stat().st_mode) == 0o660


@posix
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o755, 0o700])
def test_a_directory_for_everybody_or_one_is_no_groups(tmp_path, mode):
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(mode)
    old = os.umask(0o002)
    try:
        Run(directory).steps(50, 4)
    finally:
        os.umask(old)
    assert modes(directory) == ({0o700}, {0o600})


@posix
def test_doctor_explains_a_group(tmp_path, capsys):
    tmp_path.chmod(0o775)
    old = os.umask(0o022)
    try:
        assert main(["doctor", str(tmp_path)]) == 0
    finally:
        os.umask(old)
    said = capsys.readouterr().out
    for advice in ("chmod g+s", "umask 0022", "group=True", "chmod o-rwx"):
        assert advice in said
    tmp_path.chmod(0o2770)
    assert main(["doctor", str(tmp_path)]) == 0
    assert "chmod" not in capsys.readouterr().out
