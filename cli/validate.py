"""`recipe validate`: every mistake in recipe files, each with its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ..errors import Problem, RecipeError
from .console import console, errors

if TYPE_CHECKING:
    from ..recipes import Recipe

# What commands that take a recipe share.
RECIPE = typer.Argument(help="A recipe file, or a name from the library.", show_default=False)
SET = typer.Option(
    [], "--set", metavar="NAME=VALUE", help="Change an arg of the recipe; repeat for more."
)
USE = typer.Option(
    [], "--use", metavar="FILE", help="Python file with your own modifiers; it is run. Repeatable."
)
RECIPES = typer.Argument(help="Recipe files, or names from the library.", show_default=False)


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: recipe validate my-recipe.yaml --set sparsity=0.7")(validate)


def validate(
    recipes: list[str] = RECIPES,
    set_: list[str] = SET,
    use: list[str] = USE,
) -> None:
    """Check recipes; print every mistake with its place, and exit 2 if there is one."""
    from ..recipes import Recipe

    overrides = read_set(set_)
    wrong = 0
    for name in recipes:
        try:
            recipe = Recipe.load(name, set=overrides, use=use)
        except RecipeError as error:
            wrong += 1
            for problem in error.problems:
                errors.print(
                    str(problem), markup=False, emoji=False, highlight=False, soft_wrap=True
                )
            count = len(error.problems)
            errors.print(f"✗ {name}: {count} mistake{'s'[: count != 1]}", style="bold red")
        else:
            line = f"✓ {name}: {_summary(recipe)}"
            console.print(
                line, style="green", markup=False, emoji=False, highlight=False, soft_wrap=True
            )
    if wrong:
        raise typer.Exit(2)


def _summary(recipe: Recipe) -> str:
    """`sparsify (oneshot): SparseGPT, Quantization; recover (train): SquareHead`."""
    return "; ".join(
        f"{stage.name} ({stage.run}): {', '.join(m.key() for m in stage.modifiers) or 'training'}"
        for stage in recipe.stages
    )


def read_set(given: list[str]) -> dict[str, str]:
    """`["a=1", "b=x"]` as a mapping.

    Raises RecipeError.
    """
    overrides = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            message = "not of the form name=value; write it so, without spaces around '='"
            raise RecipeError([Problem(f"--set {item}", 0, 0, message)])
        overrides[name.strip()] = value
    return overrides
