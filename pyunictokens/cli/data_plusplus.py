"""`pyunictokens data propose` and `data accept`: UnifyBench++ texts of a folder, by a language model and a person.

The first asks and fills a sheet, the second writes what a person accepted on it; nothing leads from the one to the
other but the sheet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import UserError
from .shell import USER_ERROR, Bars, command, say
from .table_options import key_variable

RootArgument = Annotated[Path, typer.Argument(help="The data folder, the one that holds concept/train/.")]
_NamesArgument = Annotated[list[str] | None, typer.Argument(help="Concepts; all of them when left out.")]


def propose(
    root: RootArgument,
    sheet: Annotated[Path, typer.Option("--sheet", help="CSV file for the texts; what it holds is not asked again.")],
    model: Annotated[str, typer.Option("--model", help="The language model's name at the endpoint, as in gpt-4o.")],
    names: _NamesArgument = None,
    url: Annotated[str | None, typer.Option("--url", help="OpenAI-compatible endpoint, up to /v1.")] = None,
    key_env: Annotated[
        str, typer.Option("--key-env", help="Environment variable of the key; `none` where the endpoint wants none.")
    ] = "OPENAI_API_KEY",
    facts: Annotated[int, typer.Option("--facts", help="Facts, where the folder has none.")] = 8,
    dense: Annotated[int, typer.Option("--dense", help="Long prompts, where it has none.")] = 10,
    dense_reasoning: Annotated[
        int, typer.Option("--dense-reasoning", help="Long prompts that hint at facts, where it has none.")
    ] = 10,
    temperature: Annotated[float, typer.Option("--temperature", help="Sampling temperature of the model.")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 4000,
) -> None:
    """Have a language model propose the UnifyBench++ texts that a folder lacks, on a sheet for a person to review.

    Facts with reasoning prompts, long prompts, long prompts that hint at facts. Nothing is written into the data: open
    the sheet, correct the texts, write yes or no into `accept`, and give it to `data accept`. Given again,
    the command goes on where it stopped and leaves reviewed rows alone.

    Examples:

        pyunictokens data propose unifybench bo --sheet review.csv --model gpt-4o

        pyunictokens data propose unifybench --sheet review.csv --url http://localhost:8000/v1 --model m --key-env none
    """
    from ..data.folder import list_concepts, load_concept
    from ..evaluate.plusplus import PlusPlusSettings
    from ..evaluate.plusplus import propose as ask
    from ..rewards.endpoint import Endpoint, EndpointConfig
    from ..utils.files import refuse_unwritable

    settings = PlusPlusSettings(facts, dense, dense_reasoning)
    config = EndpointConfig(
        model, url, key_variable(key_env), timeout=300.0, max_tokens=max_tokens, temperature=temperature
    )
    concepts = [load_concept(root, name) for name in names or list_concepts(root)]
    if not concepts:
        raise UserError(f"{root}: holds no concept: make one with `data new`")
    refuse_unwritable(sheet)
    endpoint = Endpoint(config)
    with Bars() as bars:
        done = ask(concepts, endpoint, sheet, settings, bars)
    for note in done.notes:
        say(f"note: {note}")
    for failure in done.failures:
        say(f"nothing usable: {failure}")
    asked = endpoint.counters
    counted = f"asked {asked.answered} times, {asked.prompt_tokens} + {asked.completion_tokens} tokens"
    say(f"{sheet}: {done.new} new rows, {done.kept} were there; {counted}")
    if done.new or done.kept:
        say("review it: write yes or no into `accept`, change any text, and then:")
        say(f"  {command('data', 'accept', root, sheet)}")
    if done.failures:
        raise typer.Exit(USER_ERROR)


def accept(
    root: RootArgument,
    sheet: Annotated[Path, typer.Argument(help="The reviewed sheet, as CSV.")],
    names: _NamesArgument = None,
) -> None:
    """Write the rows of a reviewed sheet whose `accept` says yes into their concept folders, and nothing else.

    Each concept is written whole or not at all; the same sheet twice changes nothing more.

    Examples:

        pyunictokens data accept unifybench review.csv

        pyunictokens data accept unifybench review.csv bo
    """
    from ..data.review_sheet import apply_sheet, read_sheet

    rows = read_sheet(sheet)
    known = list(dict.fromkeys(row.concept for row in rows))
    for name in names or []:
        if name not in known:
            raise UserError(f"{sheet}: has no rows of {name!r}; it has {', '.join(known) or 'none at all'}")
    total, undecided = 0, 0
    problems: list[str] = []
    for name in names or known:
        try:
            done = apply_sheet(root, name, rows)
        except UserError as error:
            problems.append(str(error))
            continue
        total, undecided = total + sum(done.written.values()), undecided + done.open
        written = ", ".join(f"{count} {kind}" for kind, count in done.written.items()) or "nothing new"
        more = f", {done.there} were there" if done.there else ""
        say(f"{name}: {written} written{more}; {done.open} rows are not reviewed")
        for note in done.notes:
            say(f"note: {name}: {note}")
    if problems:
        raise UserError("\n".join(problems))
    if not total and undecided:
        say("nothing was accepted: write yes into the column `accept` of rows that are right")
    elif total:
        say(f"next: {command('data', 'check', root)}")
