"""The ``megamoe`` command: a list of verbs; each has a file in ``megamoe/commands``, imported when it runs.

Exit status: 0 done; 2 the request is wrong, said in one line on stderr; 75 a training stopped and saved when it was asked
to; 130 interrupted; else a failure while running. All of them are in docs/faults.md.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from megamoe import __version__
from megamoe.commands.lazy import LazyGroup, Verb
from megamoe.core.environment import is_rank
from megamoe.core.errors import PortTakenError, UserError
from megamoe.core.exit_status import FAILED, REQUEST_IS_WRONG
from megamoe.core.rank_end import EndKind, report_end
from megamoe.core.urls import one_line

_VERBS = {
    "train": Verb("megamoe.commands.train:train", "Train as CONFIG says, with settings changed by KEY=VALUE."),
    "eval": Verb("megamoe.commands.evaluate:evaluate", "Caption held-out pictures and count the right ones."),
    "generate": Verb("megamoe.commands.generate:generate", "Write the caption of a picture."),
    "report": Verb("megamoe.commands.report:report", "Write the run as one HTML page."),
    "plan": Verb("megamoe.commands.plan:plan", "Show how large the model of CONFIG is, without building it."),
    "checkpoint": Verb("megamoe.commands.checkpoint:checkpoint", "List, verify and delete the checkpoints of a run."),
    "launch": Verb("megamoe.commands.launch:launch", "Run on many nodes: submit to SLURM, follow, stop, resume."),
    "bench": Verb("megamoe.commands.bench:bench", "Measure this system beside its peers, in one run on this machine."),
    "demo": Verb("megamoe.commands.demo:demo", "Run all of it on a CPU in minutes, a killed worker included."),
    "data": Verb("megamoe.commands.data.group:data", "Build, check and maintain image-text shards."),
}


@click.group(cls=LazyGroup, verbs=_VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def megamoe() -> None:
    """Train sparse mixture-of-experts vision-language models from tar shards."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status; a rank reports first how it ended."""
    said, kind = "", None
    try:
        status = megamoe.main(arguments, prog_name="megamoe", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        said = f"{_one_line(error.format_message())}{hint}"
        _say(f"error: {said}")
        status = error.exit_code
    except UserError as error:
        said = _one_line(error)
        _say(f"error: {said}")
        status = REQUEST_IS_WRONG
    except click.Abort:
        _say(f"rank {os.environ['RANK']} interrupted" if is_rank() else "interrupted")
        status = 130
    except Exception as error:
        if not is_rank():
            raise
        _log_traceback()
        said, status = one_line(f"{type(error).__name__}: {error}"), FAILED
        kind = EndKind.PORT_TAKEN if isinstance(error, PortTakenError) else None
    status = status if isinstance(status, int) else 0
    if is_rank():
        report_end(status, said, kind=kind)
    _leave(status)


def _log_traceback() -> None:
    """To the log that the launcher named, or to stderr."""
    path = os.environ.get("MEGAMOE_LOG")
    if path is None:
        traceback.print_exc()
        return
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        traceback.print_exc(file=log)


def _leave(status: int) -> NoReturn:
    if not is_rank():
        sys.exit(status)
    # A rank that failed must end at once: an orderly exit waits for threads that are stuck in a collective, while its peers
    # and its launcher wait for it. One that is done must not fail now: threads of gloo that want the interpreter while it
    # is taken down abort the process (pytorch/pytorch#179291).
    if not status:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say(text: str) -> None:
    click.echo(f"megamoe: {text}", err=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
