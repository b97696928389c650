"""`jaxinfer batch`: answers a file of requests in OpenAI's batch format, and goes on where it was interrupted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from jaxinfer.cli.hosts import Hosting, hosting
from jaxinfer.cli.loading import loading
from jaxinfer.cli.options import bad_argument, integer
from jaxinfer.cli.pipe import pipe_lines
from jaxinfer.cli.speculation import Speculating, speculating


@loading
@hosting
@speculating
def batch(
    requests: Annotated[Path, typer.Argument(help="File of requests, one in a line.", exists=True, dir_okay=False)],
    answers: Annotated[Path, typer.Argument(help="File of answers; what it has already is not asked again.")],
    model: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model in requests; MODEL's.")] = None,
    max_num_seqs: Annotated[int, integer(help="Sequences that run at once; a power of two.")] = 64,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Of keys and values, also int8 or float8_e4m3fn; the model's by default.")
    ] = None,
    *,
    loading: dict[str, Any],
    speculation: Speculating,
    hosts: Hosting,
) -> None:
    """Answer every request of REQUESTS into ANSWERS, a line each; a second run does what is left."""
    try:
        from jaxinfer.serve.batch import answer_lines, append, done, read_lines
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is not installed: pip install 'jaxinfer[serve]'") from error
    from jaxinfer.engine import Options
    from jaxinfer.llm import DEMO, LLM
    from jaxinfer.machine import keep_compiled

    keep_compiled()
    with hosts.join() as group:
        try:
            if answers.exists() and answers.samefile(requests):
                raise ValueError(f"{answers} is the file of requests; give another one for the answers")
            lines = read_lines(requests)
            earlier = done(answers)
            left = [line for line in lines if line.custom_id not in earlier]
            if group is None or group.leads:
                answers.open("a").close()  # what cannot be written is told before the model is loaded
            llm = LLM(
                DEMO if model is None else model,
                **loading,
                options=Options(max_num_seqs=max_num_seqs, cache_dtype=cache_dtype, **speculation.options()),
                group=group,
            )
        except (ValueError, OSError) as error:
            raise bad_argument(error) from error
        if llm.follows:
            llm.follow()
            return
        name = served_model_name or ("demo" if model is None else model)
        console, statuses = Console(stderr=True), Counter[int]()
        speculation.warn(console.print)
        with answers.open("a", encoding="utf-8") as file, Progress(console=console) as progress:
            task = progress.add_task("requests", total=len(lines), completed=len(lines) - len(left))
            for told in answer_lines(llm, name, left):
                append(file, told)
                statuses[told["response"]["status_code"]] += 1
                progress.advance(task)
    for line in pipe_lines(llm):
        console.print(line)
    console.print(_summary(statuses, len(lines) - len(left)))


def _summary(statuses: Counter[int], there: int) -> str:
    """One line: what became of the requests.

    Args:
        there: how many had an answer before.
    """
    failed = sum(count for status, count in statuses.items() if status >= 500)
    refused = statuses.total() - statuses[200] - failed
    return f"{statuses[200]} answered, {refused} refused, {failed} failed, {there} were there already"
