"""One flat frozen dataclass a script <-> the command line <-> TOML. Nothing clever.

    @dataclass(frozen=True)
    class Config:
        lr: float = 1e-3  # peak learning rate

`parse(Config, doc)` makes `--lr` with that comment as its help. Flags override `--config FILE.toml`, which
overrides the defaults. Unknown names are errors that list near matches. A bool is `--flag`; a field without a default
is required.
"""

import argparse
import difflib
import inspect
import re
import shutil
import sys
import tomllib
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse, with near matches in its complaint about an unknown flag and one line instead of the whole usage."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = [o for a in self._actions for o in a.option_strings]
            message = f"no flag {unknown[1]}" + near(unknown[1], known)
        self.exit(2, f"error: {message} (see --help)\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """One line a flag where the terminal is wide enough."""

    def __init__(self, prog: str) -> None:
        width = min(130, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=30, width=width)


def near(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def field_help(cls: type) -> dict[str, str]:
    """field name -> the comment at the end of its line in the source."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))


def from_dict(cls: type[T], values: dict[str, Any], source: str) -> T:
    """cls(**values) with every name and type checked; `source` names where they came from. Raises ValueError."""
    known = {f.name: f for f in fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{source}: no setting {name!r}{near(name, list(known))}")
        if not _fits(value, known[name].type):
            raise ValueError(f"{source}: {name} must be {_type_name(known[name].type)}, got {value!r}")
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ValueError(f"{source}: required: {', '.join(map(flag, missing))}")
    # TOML has lists where we keep tuples, and writes 1 where 1.0 is meant
    return cls(**{n: _convert(v, known[n].type) for n, v in values.items()})


# ---- checks of a config's values, for its __post_init__; each raises ValueError naming the flag ----


def at_least(low: int, c: object, names: str) -> None:
    for name in names.split():
        if not getattr(c, name) >= low:  # so that nan fails too
            raise ValueError(f"{flag(name)} must be at least {low}, got {getattr(c, name)}")


def above_zero(c: object, names: str) -> None:
    for name in names.split():
        if not getattr(c, name) > 0:
            raise ValueError(f"{flag(name)} must be above 0, got {getattr(c, name)}")


def one_of(c: object, **allowed: Collection[str]) -> None:
    for name, values in allowed.items():
        given = getattr(c, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value not in values:
                known = f"{near(value, list(values))}; there are {', '.join(values)}"
                raise ValueError(f"{flag(name)}: no {value!r}{known}")


def flag(name: str) -> str:
    """The flag of a config's field."""
    return "--" + name.replace("_", "-")


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _fits(value: Any, kind: Any) -> bool:
    base = getattr(kind, "__origin__", None)
    if base is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(v, kind.__args__[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if kind is bool else str)


def _convert(value: Any, kind: Any) -> Any:
    if getattr(kind, "__origin__", None) is tuple:
        return tuple(_convert(v, kind.__args__[0]) for v in value)
    return float(value) if kind is float else value


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); expected a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error


def parse(cls: type[T], doc: str, argv: list[str] | None = None, *, presets: Path | None = None, preset: str = "") -> T:
    """The command line as a config; the first paragraph of `doc` is the help's description. With `presets` (a folder), `--preset NAME` reads NAME.toml from it first."""
    parser = Parser(
        description=doc.split("\n\n")[0], usage="%(prog)s [--flag VALUE ...]", formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings from a file; flags override it")
    if presets is not None:
        names = sorted(p.stem for p in presets.glob("*.toml"))
        parser.add_argument(
            "--preset", choices=names, default=preset, help=f"settings to start from (default {preset})"
        )
    comments = field_help(cls)
    for f in fields(cls):
        if presets is not None and f.name == "preset":
            continue
        kind = f.type
        default = " (required)" if f.default is MISSING else f" (default {_show(f.default)})"
        text = (comments[f.name] + (default if f.default not in ("", False) else "")).replace("%", "%%")
        options: dict[str, Any] = dict(default=argparse.SUPPRESS, help=text)
        if kind is bool:
            parser.add_argument(flag(f.name), action="store_true", **options)
        elif getattr(kind, "__origin__", None) is tuple:
            parser.add_argument(flag(f.name), nargs="+", type=kind.__args__[0], metavar="X", **options)
        else:
            parser.add_argument(flag(f.name), type=kind, metavar=kind.__name__.upper(), **options)
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    chosen = given.pop("preset", None)
    if chosen:
        values |= read_toml(presets / f"{chosen}.toml") | {"preset": chosen}
    file = given.pop("config")
    if file:
        values |= read_toml(file)
    return from_dict(cls, values | given, file or "command line")


def show_help(cls: type, doc: str, **options: Any) -> None:
    """Answer --help and end, if it is among the arguments; the scripts call this before their slow imports."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parse(cls, doc, **options)


def _show(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def run_cli(main, *arguments) -> None:
    """Call main; an error that the user can mend is one sentence on stderr and exit code 2."""
    try:
        main(*arguments)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename and error.strerror:
            error = f"{error.filename}: {error.strerror}"
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
