"""The settings of every command: one frozen dataclass, filled from the command line and from TOML files.

    @dataclass(frozen=True)
    class SFTConfig(config.Config):
        steps: Count = 300  # optimizer steps

The comment is the help of `--steps`, and the type says which values are allowed. Flags override `--config FILE.toml`,
which overrides the defaults. A field without a default is required, a bool is a flag that takes no value, and an
`Argument` is written without its flag. A setting that is unknown, missing or not allowed is an error of one sentence.
"""

import argparse
import contextlib
import difflib
import filecmp
import inspect
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from nanopcf.run.untrusted import panicked, printable

T = TypeVar("T")

# ---- the types of fields ----


class Rule(NamedTuple):
    """What a value must be beyond its type, and the words that tell a user so."""

    holds: Callable[[Any], bool]
    words: str


# Every comparison with nan is false, so these rules refuse nan.
FITS = Rule(lambda value: value < 2**63, "must be below 2^63")
Count = Annotated[int, Rule(lambda value: value >= 1, "must be at least 1"), FITS]
Natural = Annotated[int, Rule(lambda value: value >= 0, "must be at least 0"), FITS]
Threads = Annotated[int, Rule(lambda value: 0 <= value <= 1024, "must be from 0 to 1024")]  # too many: torch crashes
Positive = Annotated[float, Rule(lambda value: value > 0, "must be above 0")]
FINITE = Rule(lambda value: value < math.inf, "must be finite")
NonNegative = Annotated[float, Rule(lambda value: value >= 0, "must be at least 0"), FINITE]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "is a share from 0 to 1")]
PositiveShare = Annotated[float, Rule(lambda value: 0 < value <= 1, "must be above 0 and at most 1")]
Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16"]
VERIFIERS = Rule(("auto", "ours", "math-verify").__contains__, "must be auto, ours or math-verify")
MATH = Rule(lambda name: name != "math-verify" or find_spec("math_verify"), 'needs pip install -e ".[math]"')
Verifier = Annotated[str, VERIFIERS, MATH]
NOT_EMPTY = Rule(bool, "must not be empty")
Argument = Annotated[str, NOT_EMPTY]
# Text whose flag reads \n, \t and \\ as TOML does: a shell hands over a backslash and an n.
ESCAPED = Rule(lambda value: True, "")
Text = Annotated[str, ESCAPED]


def take_apart(kind: Any) -> tuple[type, tuple[Rule, ...]]:
    """The plain type (bool, int, float or str) of a field, or of the items of a tuple, and its rules."""
    if get_origin(kind) is tuple:
        return take_apart(get_args(kind)[0])
    if get_origin(kind) is Literal:
        *most, last = words = get_args(kind)
        return str, (Rule(words.__contains__, f"must be {', '.join(most)} or {last}"),)
    return getattr(kind, "__origin__", kind), getattr(kind, "__metadata__", ())


class Config:
    """Base of every settings dataclass: each value is checked when one is made, from Python as from a command line."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = checked(field.name, getattr(self, field.name), field.type)
            if value == () and field.default is MISSING:
                raise ValueError(f"{flag(field.name)} needs at least one value")
            object.__setattr__(self, field.name, value)  # a frozen dataclass has no other way


def checked(name: str, value: Any, kind: Any) -> Any:
    """The value as its field keeps it: a list of TOML as a tuple, and 1 as 1.0 where a float is meant.

    Raises TypeError when it is of another type, and ValueError when it breaks a rule.
    """
    base, rules = take_apart(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be tuple[{base.__name__}, ...], got {value!r}")
        return tuple(checked(name, item, get_args(kind)[0]) for item in value)
    if base is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not base:
        raise TypeError(f"{name} must be {base.__name__}, got {value!r}")
    for rule in rules:
        if not rule.holds(value):
            raise ValueError(f"{flag(name)} {rule.words}, got {value!r}")
    return value


def one_of(c: Config, **tables: Collection[str]) -> None:
    """Check that fields hold names of a table that is kept elsewhere: one_of(self, algo=RECIPES)."""
    for name, known in tables.items():
        value = getattr(c, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item not in known:
                raise ValueError(f"{flag(name)}: no {item!r}{near(item, known)}; there are {', '.join(known)}")


def different_files(c: Config, *names: str) -> None:
    """Check that two fields do not name files of the same content, be it one file or a copy."""
    one, other = paths = [Path(getattr(c, name)) for name in names]
    if all(path.is_file() for path in paths) and filecmp.cmp(one, other, shallow=False):
        raise ValueError(f"{' and '.join(map(flag, names))} are the same file, {other}; give them different examples")


def near(name: str, known: Collection[str]) -> str:
    """The known names that an unknown one may have meant, to be added to a sentence about it."""
    matches = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- from TOML and from the command line ----


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); expected a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error


def from_dict(cls: type[T], values: dict[str, Any], source: str) -> T:
    """cls(**values). Raises ValueError; `source` tells the user where the values came from."""
    known = {field.name: field for field in fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{source}: no setting {name!r}{near(name, known)}")
        try:
            checked(name, value, known[name].type)
        except (TypeError, OverflowError) as error:  # the latter: an integer beyond the largest float
            raise ValueError(f"{source}: {error}") from error
    missing = [flag(name) for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"{source}: required: {', '.join(missing)}")
    return cls(**values)


def field_help(cls: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line in the source. Raises ValueError when there is none."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    for field in fields(cls):
        if field.name not in comments:
            raise ValueError(f"{cls.__name__}.{field.name} needs a comment at the end of its line: it is the help")
    return comments


class Parser(argparse.ArgumentParser):
    """argparse with an error of one line, which names the flags that a misspelt one may have meant."""

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            message = f"no flag {unknown[1]}{near(unknown[1], known)}"
        self.exit(2, f"error: {printable(message)} (see --help)\n")


def make_parser(cls: type, doc: str | None) -> Parser:
    """A parser with one flag per field. It knows no default: what is not given must not override a file."""
    spec = sys.modules["__main__"].__spec__  # None when a script runs, and not a module
    parser = Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=(doc or "").split("\n\n")[0] + " Defaults are in brackets.",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=40),  # room for the longest flag
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings from a file; flags override it")
    comments, arguments = field_help(cls), ""
    for field in fields(cls):
        base, rules = take_apart(field.type)
        name, metavar, text = flag(field.name), "N" if base is int else "X", comments[field.name]
        if NOT_EMPTY in rules:
            name, metavar = field.name, field.name.upper()
            arguments += f" {metavar}"
        default = "required" if field.default is MISSING else field.default
        if default not in ("", False, ()):
            text += f" [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        if base is bool:
            options["action"] = "store_true"
        else:
            nargs = "*" if get_origin(field.type) is tuple else None  # an empty list takes the place of a default
            options |= {"type": unescaped if ESCAPED in rules else base, "metavar": metavar, "nargs": nargs}
        parser.add_argument(name, **options)
    parser.usage = f"%(prog)s{arguments} [--flag VALUE ...]"
    return parser


def unescaped(text: str) -> str:
    """The text of a flag with \\n, \\r, \\t and \\\\ as TOML reads them; other backslashes, as in \\boxed, stay."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}.get(match[1], match[1]), text)


def parse(cls: type[T], doc: str, argv: list[str] | None = None, *, presets: Path | None = None, preset: str = "") -> T:
    """The settings that a command line gives; the first paragraph of `doc` is the description in --help.

    With a folder of `presets` they start from the file there that --preset names, or else `preset`.
    """
    given = vars(make_parser(cls, doc).parse_args(argv))
    file, values = given.pop("config", ""), {}
    if presets is not None:
        name = given.get("preset", preset)
        known = sorted(path.stem for path in presets.glob("*.toml"))
        if name not in known:
            raise ValueError(f"--preset: no {name!r}{near(name, known)}; there are {', '.join(known)}")
        values = read_toml(presets / f"{name}.toml") | {"preset": name}
    if file:
        values |= read_toml(file)
    return from_dict(cls, values | given, file or "command line")


def show_help(cls: type, doc: str, **options: Any) -> None:
    """Answer --help and end, if it is among the arguments; the scripts call this before their slow imports."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        run_cli(partial(parse, cls, doc, **options))


def run_cli(main: Callable, *arguments: Any) -> None:
    """Call main(*arguments); an error that the user can mend is one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal doesn't know is no reason to lose a result
            stream.reconfigure(errors="replace")
    try:
        try:
            main(*arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `... | head -1`; Python would complain again at its exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as if by SIGPIPE
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        sentence = told(error)
        if not sentence:
            raise
        print(f"error: {printable(sentence)}", file=sys.stderr)
        sys.exit(2)


def told(error: BaseException) -> str:
    """The sentence for an error that the user can mend; "" for one that is ours."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if type(error).__name__ == "BrokenProcessPool":
        return "a worker process was killed; often the system has run out of memory"
    if out_of_memory(error):
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        more = f" for {wanted[1]} more" if wanted else ""
        return f"not enough memory{more}; fewer sequences, rows or points at a time need less"
    if panicked(error):
        return f"a library failed on what it was given: {error}"
    return ""


def out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for it on a GPU, and on a CPU only a text."""
    texts = ("can't allocate memory", "not enough memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))
    )
