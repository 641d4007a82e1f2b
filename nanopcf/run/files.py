"""Files that are written completely or not at all: under a temporary name, flushed to the disk, then renamed.

So whoever reads a file sees a complete one, even after a kill or a power cut in the middle of writing.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link, and then writing would change a file elsewhere
    try:
        with named(path):
            temporary.write_bytes(content)
            flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Append to a file, and flush it to the disk. Raises OSError that names the file."""
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give the errors of writing a file its name, which the system leaves out where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Force a file out of the system's buffers. Without this a power cut could leave the new name with old content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def strict(value: object) -> object:
    """The value with null in place of numbers that are not finite, which JSON does not know and Python writes anyway.

    For files that others read; in our own an infinite setting must come back as it was.
    """
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # the latter: brackets nested too deep
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make a folder whose files write(folder) writes. An older folder of the same name is replaced."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with named(path):
            write(temporary)
            for file in temporary.iterdir():
                flush(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    older = set_aside(path)
    os.replace(temporary, path)
    shutil.rmtree(older, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a folder that is to be removed; returns its new name.

    Removing takes time. If a kill interrupts it, the half-removed folder must not be taken for a complete one.
    """
    older = folder.with_name(folder.name + ".old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    return older
