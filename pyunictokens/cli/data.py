"""`pyunictokens data …`: look at concept folders, check them, make one from photos, write a toy one.

Everything is done by `pyunictokens.data`; this file turns flags into calls and findings into tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import UserError
from . import data_import, data_negatives, data_plusplus
from .shell import USER_ERROR, Bars, SeedOption, command, console, guarded, plain_table, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Concept folders: list, check, make.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RootArgument = Annotated[Path, typer.Argument(help="The data folder, the one that holds concept/train/.")]


def check(
    root: RootArgument,
    name: Annotated[str | None, typer.Argument(help="One concept; all of them when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Find everything that is wrong in a data folder, in one go. Changes nothing on disk.

    The exit code is 0 without errors (warnings are allowed) and 2 with errors.

    Examples:

        pyunictokens data check mydata

        pyunictokens data check mydata bo
    """
    from ..data.check import check_folder
    from ..data.folder import list_concepts
    from ..data.parse import ERROR

    names = [name] if name is not None else list_concepts(root)
    with Bars() as bars:
        seen = 0

        def step(current: str) -> None:
            nonlocal seen
            bars("checking", seen, max(len(names), 1), {"note": current})
            seen += 1

        problems = check_folder(root, name, progress=step)
        bars("checking", max(len(names), 1), max(len(names), 1))
    errors = sum(problem.severity == ERROR for problem in problems)
    if as_json:
        rows = [{"severity": p.severity, "file": p.file, "field": p.field, "message": p.message} for p in problems]
        typer.echo(json.dumps(rows, indent=1))
    elif problems:
        from rich.markup import escape

        table = plain_table("", "")
        table.show_header = False
        for problem in problems:
            colour = "red" if problem.severity == ERROR else "yellow"
            place = escape(problem.file) + (f" [dim]{escape(problem.field)}[/dim]" if problem.field else "")
            table.add_row(f"[{colour}]{problem.severity}[/{colour}]", f"{place}\n{escape(problem.message)}")
        console().print(table)
        counts = ((errors, "error"), (len(problems) - errors, "warning"))
        say(", ".join(f"{number} {what}{'' if number == 1 else 's'}" for number, what in counts))
    else:
        say(f"{root}: {len(names)} concept{'s' if len(names) != 1 else ''}, no problems")
    if errors:
        raise typer.Exit(USER_ERROR)


def new(
    root: Annotated[Path, typer.Argument(help="The data folder; made when it is not there.")],
    name: Annotated[str, typer.Argument(help="The concept's name; its token becomes `<NAME>`.")],
    photos: Annotated[
        list[Path] | None, typer.Argument(help="Photos, or folders of them, in any number. About ten photos work best.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="human, animal or object.")] = "object",
    class_word: Annotated[str, typer.Option("--class", help="What it is, in a word or two: dog, mug, woman.")] = "",
    info: Annotated[
        str, typer.Option("--info", help="A sentence on how it looks, as in `<bo> is a small brown dog.`")
    ] = "",
    facts: Annotated[
        Path | None, typer.Option("--facts", help="YAML sheet of facts and questions (see --template).")
    ] = None,
    negatives: Annotated[
        list[Path] | None,
        typer.Option("--negatives", help="Folder of images of other things of the same class; may be given again."),
    ] = None,
    test_photos: Annotated[int, typer.Option("--test-photos", min=0, help="How many photos are kept for testing.")] = 2,
    template: Annotated[
        bool, typer.Option("--template", help="Print a sheet of facts to fill in, and make nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a concept of this name.")] = False,
) -> None:
    """Make a concept from ordinary photos and a sheet of facts. All or nothing.

    What a file is counts, not its ending: PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF, and HEIC with pyunictokens[heif].
    Every image that is not used is named.

    Examples:

        pyunictokens data new mydata bo --kind animal --class dog --template > bo.yaml

        pyunictokens data new mydata bo photos/ --kind animal --class dog --facts bo.yaml

        pyunictokens data new mydata mug a.jpg more/ --class mug --info "<mug> is a blue mug."
    """
    from ..data.facts import facts_template
    from ..data.new import new_concept
    from ..data.photographs import toy_on_photographs

    if template:
        typer.echo(facts_template(name, kind, class_word or "thing"), nl=False)
        return
    if not photos:
        raise UserError("no photos: name image files or folders of them")
    if not class_word:
        raise UserError("--class is missing: say what it is in a word or two, as in --class dog")
    with Bars() as bars:
        made = new_concept(
            root,
            name,
            photos,
            kind=kind,
            class_word=class_word,
            info=info,
            spec_yaml=facts,
            negatives=negatives,
            test_photos=test_photos,
            force=force,
            progress=bars.each("reading photos", len(photos)),
        )
    concept = made.concept
    facts_given = len(concept.extra_info)
    say(
        f"{concept.name}: {len(concept.train_images)} photos to learn from, {len(concept.test_images)} to test with, "
        f"{facts_given} fact{'' if facts_given == 1 else 's'}; images of other things: {made.negatives}"
    )
    for note in made.notes:
        say(f"note: {note}")
    real = command("train", root, name, "--out", f"runs/{name}", "--model", "show-o-512")
    say(f"next: {real}")
    say("with --plan it says first what that takes: download, memory, hours and cost")
    say(f"without --model {toy_on_photographs(root, name)}")


def toy(
    root: Annotated[Path, typer.Argument(help="The data folder; made when it is not there.")],
    name: Annotated[str, typer.Argument(help="The concept's name.")] = "bo",
    kind: Annotated[str, typer.Option("--kind", help="human, animal or object.")] = "animal",
    seed: SeedOption = 0,
) -> None:
    """Write a toy concept: a drawn subject that the embedded model has never seen, with facts and questions.

    Examples:

        pyunictokens data toy toydata/

        pyunictokens data toy toydata/ ann --kind human --seed 3
    """
    from ..data.concept import KINDS, concept_name
    from ..toy.concept import write_toy_concept

    if kind not in KINDS:
        raise UserError(f"--kind {kind}: must be one of {', '.join(KINDS)}")
    concept_name(name)
    if (root / "concept" / "train" / name).exists():
        raise UserError(f"{root / 'concept' / 'train' / name}: is there already: choose another name or folder")
    write_toy_concept(root, seed=seed, kind=kind, name=name)
    following = command("train", root, name, "--out", f"runs/{name}")
    say(f"{name} written to {root}; next: {following}")


def list_(root: RootArgument) -> None:
    """List the concepts of a data folder.

    Example:

        pyunictokens data list toydata/
    """
    from rich.markup import escape

    from ..data.folder import list_concepts, read_concept
    from ..data.parse import ERROR

    table = plain_table("name", "kind", "class", "images", "test", "facts", "errors")
    for name in list_concepts(root):
        try:
            concept, problems = read_concept(root, name)
        except UserError as error:
            table.add_row(escape(name), "", escape(str(error)), "", "", "", "1")
            continue
        errors = sum(problem.severity == ERROR for problem in problems)
        counts = (len(concept.train_images), len(concept.test_images), len(concept.extra_info), errors)
        table.add_row(escape(name), concept.kind, escape(concept.class_word), *map(str, counts))
    console().print(table)


app.command("list")(guarded(list_))
app.command("check")(guarded(check))
app.command("new")(guarded(new))
app.command("import")(guarded(data_import.import_))
app.command("toy")(guarded(toy))
app.command("negatives")(guarded(data_negatives.negatives))
app.command("propose")(guarded(data_plusplus.propose))
app.command("accept")(guarded(data_plusplus.accept))
