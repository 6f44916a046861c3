"""A C file is compiled once, by whatever compiler there is, and what goes wrong is told with its remedy."""

import errno
import os
import shlex
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from lightning_l2l.rules.kernels import compiled
from lightning_l2l.rules.kernels.compiled import COMPILERS, NotCompiled, find_compiler, load_compiled

CC = next(filter(None, map(shutil.which, COMPILERS)), None)
FLAGS = ("-shared", "-fPIC")
pytestmark = [
    pytest.mark.skipif(CC is None, reason="no C compiler here"),
    pytest.mark.skipif(sys.platform == "win32", reason="compilers here are shell scripts"),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The folder of the cache, which is not there yet."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache" / "lightning_l2l"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text("#ifndef ANSWER\n#define ANSWER 42\n#endif\nint answer(void) { return ANSWER; }\n")
    return path


def script(path, *lines):
    """An executable that is a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def failing(error):
    def fail(*given, **options):
        raise error

    return fail


def answer(source):
    library, problem = load_compiled([source], FLAGS)
    assert problem is None
    return library.answer()


def refused(source):
    with pytest.raises(NotCompiled) as caught:
        load_compiled([source], FLAGS)
    return str(caught.value)


# ---- the cache ----


def test_it_is_compiled_once_into_a_folder_that_is_the_users_alone(monkeypatch, source, cache, tmp_path):
    monkeypatch.setenv("CC", str(script(tmp_path / "counting", f"echo >> {tmp_path}/runs", f'exec {CC} "$@"')))
    assert [answer(source), answer(source)] == [42, 42]
    assert (tmp_path / "runs").read_text() == "\n"
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    source.write_text("int answer(void) { return 43; }")
    assert answer(source) == 43 and (tmp_path / "runs").read_text() == "\n\n"


def test_what_is_in_the_cache_is_used_though_nothing_can_be_written_there(monkeypatch, source):
    assert answer(source) == 42
    monkeypatch.setattr(Path, "mkdir", failing(OSError(errno.EROFS, "Read-only file system")))
    monkeypatch.setattr(compiled.subprocess, "run", failing(AssertionError))
    assert answer(source) == 42


def test_a_damaged_file_in_the_cache_is_named(monkeypatch, source, cache, tmp_path):
    path = script(tmp_path / "damaging", "for last; do :; done", 'echo "no library" > "$last"')
    monkeypatch.setenv("CC", str(path))
    message = refused(source)
    (library,) = cache.iterdir()
    script(path, f'exec {CC} "$@"')
    assert refused(source) == message
    assert f"{library} cannot be loaded" in message and "; delete that file" in message
    library.unlink()
    assert answer(source) == 42


# ---- the compiler ----


@pytest.mark.parametrize("given", [None, "", " \t"])
@pytest.mark.parametrize("name", COMPILERS)
def test_without_cc_the_usual_names_are_looked_for(monkeypatch, tmp_path, given, name):
    if given is not None:
        monkeypatch.setenv("CC", given)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCompiled, match="no C compiler is on the PATH, none of cc, gcc, clang; install a C compiler"):
        find_compiler()
    path = script(tmp_path / name)
    assert find_compiler() == [str(path)]


def test_cc_may_be_several_words_which_are_kept_and_told_apart_in_the_cache(monkeypatch, source, cache, tmp_path):
    script(tmp_path / "bin" / "wrapper", 'exec "$@"')
    script(tmp_path / "a folder" / "cc", f'exec {CC} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    quoted = shlex.quote(str(tmp_path / "a folder" / "cc"))
    given = {
        str(tmp_path / "a folder" / "cc"): 42,
        CC: 42,
        f"{CC} -DANSWER=7": 7,
        f"wrapper {CC} -DANSWER=8": 8,
        f'  {quoted} -DANSWER="(4 + 5)" ': 9,
    }
    found = {}
    for words in given:
        monkeypatch.setenv("CC", words)
        found[words] = answer(source)
    assert found == given
    assert len(list(cache.iterdir())) == len(given)


@pytest.mark.parametrize(
    "given, cause",
    [
        ("no-such-compiler -m64", "CC='no-such-compiler -m64' names no program that there is"),
        ("cc '-m64", 'CC="cc \'-m64" cannot be split into words (No closing quotation)'),
        ("''", "names no program that there is"),
    ],
)
def test_a_cc_that_names_no_compiler_is_refused(monkeypatch, source, given, cause):
    monkeypatch.setenv("CC", given)
    message = refused(source)
    assert cause in message and message.endswith("; install a C compiler such as gcc or clang, or name another in CC")


SPEAKING = [
    "echo 'cc: warning: something else' >&2",
    "echo \"cc: error: unsupported option '-fopenmp'\" >&2",
    "echo 'cc: note: more' >&2",
    "exit 1",
]


@pytest.mark.parametrize(
    "lines, cause",
    [
        (SPEAKING, "failed (cc: error: unsupported option '-fopenmp');"),
        (["echo >&2", "echo 'it does not like this' >&2", "exit 1"], "failed (it does not like this);"),
        (["exit 3"], "failed (exit status 3, without a word);"),
        ([f"echo 'error: {'long ' * 1000}' >&2", "exit 1"], "long long ...);"),
        (["exec sleep 5"], "took over 0.2 seconds;"),
    ],
)
def test_a_compiler_that_fails_is_named_with_what_it_said(monkeypatch, source, tmp_path, cache, lines, cause):
    path = script(tmp_path / "failing", *lines)
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setattr(compiled, "_MOST_SECONDS", 0.2)
    message = refused(source)
    assert f"the compiler {path} " in message and cause in message and "; install a C compiler" in message
    assert len(message) < len(str(path)) + 400
    assert not list(cache.iterdir())


def test_a_compiler_that_is_no_program_is_named(monkeypatch, source, tmp_path):
    path = script(tmp_path / "empty")
    path.write_bytes(b"")
    monkeypatch.setenv("CC", str(path))
    assert f"the compiler {path} cannot be run (Exec format error)" in refused(source)


def test_a_source_that_cannot_be_read_is_told(tmp_path):
    assert "No such file" in refused(tmp_path / "none.c")


# ---- where nothing can be kept ----


def below_a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")
    return "Not a directory"


def with_an_endless_name(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 300)))
    return "File name too long"


def without_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", failing(RuntimeError("Could not determine home directory.")))
    return "Could not determine home directory"


def with_a_folder_that_is_not_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "replace", failing(PermissionError(errno.EACCES, "Permission denied")))
    return "Permission denied"


WAYS = [below_a_file, with_an_endless_name, without_a_home, with_a_folder_that_is_not_ones_own]


@pytest.mark.parametrize("way", WAYS)
def test_a_private_folder_takes_the_caches_place_and_leaves_nothing_behind(monkeypatch, source, tmp_path, way):
    cause, modes, load = way(monkeypatch, tmp_path), [], compiled._load
    monkeypatch.setattr(
        compiled, "_load", lambda path: modes.append(stat.S_IMODE(path.parent.stat().st_mode)) or load(path)
    )
    library, problem = load_compiled([source], FLAGS)
    assert library.answer() == 42 and modes == [0o700]
    assert cause in problem and problem.endswith("; set XDG_CACHE_HOME to a folder that can be written to")
    assert not list((tmp_path / "tmp").iterdir())


def test_where_nothing_can_be_written_at_all_both_folders_are_told(monkeypatch, source, tmp_path):
    below_a_file(monkeypatch, tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", failing(OSError(errno.ENOSPC, "No space left on device")))
    message = refused(source)
    assert "Not a directory" in message and "No space left on device" in message and "; set XDG_CACHE_HOME" in message


def test_a_compiler_that_fails_in_the_private_folder_is_named_all_the_same(monkeypatch, source, tmp_path):
    below_a_file(monkeypatch, tmp_path)
    monkeypatch.setenv("CC", "false")
    assert "false failed" in refused(source)
    assert not list((tmp_path / "tmp").iterdir())
