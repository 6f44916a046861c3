"""A library made from C when it is first wanted, and kept in the user's cache folder.

The compiler is what `CC` names, as in `CC=clang` or `CC="ccache gcc"`, else the first of `COMPILERS` that there is.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lightning_l2l.arguments import brief

#: What is looked for where the environment does not name a compiler.
COMPILERS = ("cc", "gcc", "clang")
_ANOTHER = "install a C compiler such as gcc or clang, or name another in CC"
_WRITABLE = "set XDG_CACHE_HOME to a folder that can be written to"
_MOST_SECONDS = 60


class NotCompiled(Exception):
    """There is no library: the cause and the remedy."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")


def load_compiled(sources: Sequence[Path], flags: Sequence[str]) -> tuple[ctypes.CDLL, str | None]:
    """The library that C files compile to, from the cache or made now.

    Args:
        sources: The files, the first of which gives the library its name, and the headers that they include.
        flags: For the compiler, besides those that `CC` has.

    Returns:
        The library; and where it could not be kept the cause and the remedy, else None.

    Raises:
        NotCompiled: It cannot be made or loaded.
    """
    compiler = find_compiler()
    try:
        identity = (*(source.read_text() for source in sources), *compiler, *flags, *platform.uname(), _processor())
    except OSError as error:
        raise NotCompiled(f"its source cannot be read ({error})", "install lightning-l2l anew") from error
    name = f"{sources[0].stem}-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"
    command = [*compiler, *flags, *(str(source) for source in sources if source.suffix == ".c"), "-o"]
    try:
        library = cache_folder() / name
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Beside its place, so that moving it is atomic.
            with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as scratch:
                os.replace(_compile(command, Path(scratch) / name), library)
    except OSError as error:
        return _load_unkept(command, name, error)
    return _load(library), None


def find_compiler() -> list[str]:
    """The C compiler's path, and the further words of `CC`.

    Raises:
        NotCompiled: There is none.
    """
    given = os.environ.get("CC", "").strip()
    if not given:
        found = next(filter(None, map(shutil.which, COMPILERS)), None)
        if found is None:
            raise NotCompiled(f"no C compiler is on the PATH, none of {', '.join(COMPILERS)}", _ANOTHER)
        return [found]
    whole = shutil.which(given)  # a path may have spaces, or backslashes
    if whole is not None:
        return [whole]
    try:
        first, *others = shlex.split(given)
    except ValueError as error:
        raise NotCompiled(f"CC={brief(given)} cannot be split into words ({error})", _ANOTHER) from error
    found = shutil.which(first)
    if found is None:
        raise NotCompiled(f"CC={brief(given)} names no program that there is", _ANOTHER)
    return [found, *others]


def cache_folder() -> Path:
    """Where libraries are kept.

    Raises:
        OSError: Nobody's home is known.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "lightning_l2l"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def _compile(command: Sequence[str], library: Path) -> Path:
    """Run the compiler; no OSError of its own is let through, since that would mean the folder."""
    try:
        subprocess.run(
            [*command, str(library)], check=True, capture_output=True, timeout=_MOST_SECONDS, errors="replace"
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        first = lines[0] if lines else f"exit status {error.returncode}, without a word"
        said = next((line for line in lines if "error" in line.lower()), first)
        cause = f"the compiler {command[0]} failed ({textwrap.shorten(said, 200, placeholder=' ...')})"
        raise NotCompiled(cause, _ANOTHER) from error
    except subprocess.TimeoutExpired as error:
        raise NotCompiled(f"the compiler {command[0]} took over {_MOST_SECONDS} seconds", _ANOTHER) from error
    except OSError as error:
        raise NotCompiled(f"the compiler {command[0]} cannot be run ({error.strerror})", _ANOTHER) from error
    return library


def _load_unkept(command: Sequence[str], name: str, problem: OSError) -> tuple[ctypes.CDLL, str]:
    """Compile into a folder of this process alone, since the cache folder has this problem."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="lightning_l2l-", ignore_cleanup_errors=True)
    except OSError as error:
        raise NotCompiled(f"there is no folder to write it to ({problem}; {error.strerror})", _WRITABLE) from error
    with scratch:  # what is loaded stays so when its file is gone
        return _load(_compile(command, Path(scratch.name) / name)), f"it cannot be kept ({problem}); {_WRITABLE}"


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        remedy = "delete that file, or set XDG_CACHE_HOME to a folder from which programs may run"
        raise NotCompiled(f"{library} cannot be loaded ({error})", remedy) from error


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
