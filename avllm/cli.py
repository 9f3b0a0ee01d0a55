"""The ``avllm`` command. What a command needs is imported inside it, so that ``avllm --help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="avllm",
    help="Make a language model see and hear: ask, evaluate, look at data, parts and checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """The entry point: a mistake of the user's is one line on stderr and exit code 1; a bug is a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # main() reads the flag from the command line itself; declaring it here puts it into --help.
    del debug


@app.command()
def ask(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    video: Annotated[list[Path] | None, typer.Option(help="A video file; may be given several times.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound file, or a video whose sound is meant.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture.")] = None,
    sound: Annotated[str, typer.Option(help="The videos' own sound: auto, on or off.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy: the same answer each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of probability that is sampled from.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    quantize: Annotated[str | None, typer.Option(help="Load the LLM in 4bit or 8bit.")] = None,
) -> None:
    """Ask about a clip; the answer streams to the terminal."""
    from avllm.log import hush_libraries

    hush_libraries()
    from avllm.inference.chat import Chat

    chat = Chat.load(checkpoint, device=device, quantize=quantize)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    for piece in chat.ask(question, video=video, audio=audio, image=image, sound=sound, **settings):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


if __name__ == "__main__":
    main()
