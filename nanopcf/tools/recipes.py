"""The table that `train_rl.py --list` prints, and the choices that `--set FIELD=VALUE` changes."""

from collections.abc import Sequence
from dataclasses import fields, replace

from nanopcf.objectives import RECIPES, Recipe
from nanopcf.run import config


def recipe_table() -> str:
    """RECIPES as text, one row per algorithm and one column per choice; a dot is the default, see the first row."""

    def cell(recipe: Recipe, field) -> str:
        value = getattr(recipe, field.name)
        return "." if value == field.default else str(value)

    varying = [f for f in fields(Recipe) if len({getattr(r, f.name) for r in RECIPES.values()}) > 1]
    rows = [["", *(f.name for f in varying)], ["default", *(str(f.default) for f in varying)]]
    rows += [[name, *(cell(r, f) for f in varying)] for name, r in RECIPES.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    same = [f"{f.name} {getattr(RECIPES['grpo'], f.name)}" for f in fields(Recipe) if f not in varying]
    return "\n".join([*lines, "the same for all: " + ", ".join(same)])


def with_choices(recipe: Recipe, choices: Sequence[str]) -> Recipe:
    """The recipe with FIELD=VALUE choices changed. Raises ValueError on an unknown field or a value of another type."""
    kinds = {f.name: f.type for f in fields(Recipe)}
    changed: dict[str, object] = {}
    for choice in choices:
        name, equals, value = choice.partition("=")
        if name not in kinds or not equals:
            raise ValueError(f"--set {choice}: expected FIELD=VALUE with a field of {', '.join(kinds)}")
        try:
            if kinds[name] is bool:
                changed[name] = {"true": True, "false": False}[value.lower()]
            else:
                changed[name] = kinds[name](value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"--set {choice}: {value!r} is no {kinds[name].__name__}") from error
    return replace(recipe, **changed)


def print_recipes() -> None:
    """What `train_rl.py --list` prints: the table, then a line for each choice."""
    print(recipe_table())
    print("\nchoices, for --set:")
    for name, comment in config.field_help(Recipe).items():
        print(f"  {name:<18}{comment}")
