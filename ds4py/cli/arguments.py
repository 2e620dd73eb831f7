"""The options that several commands of `ds4` share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|DIR",
        help="Model to use. Default: $DS4_MODEL, else the embedded model.",
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Name or directory. Default: $DS4_MODEL, else the embedded model.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT|-", show_default=False, help="The prompt; - reads stdin."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is, without chat encoding.")
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT|FILE", help="System message, or a file that holds it."),
]
ThinkMax = Annotated[bool, typer.Option("--think-max", help="Reason at length before answering.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Longest answer, reasoning included. Default: the context."),
]
Temperature = Annotated[
    float | None, typer.Option(metavar="F", help="0 takes the likeliest token. Default: 1.")
]
TopP = Annotated[
    float | None, typer.Option(metavar="F", help="Sample within this probability. Default: 1.")
]
TopK = Annotated[
    int | None, typer.Option(metavar="N", help="Sample among the N likeliest. Default: 0, all.")
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="F", help="Drop tokens below F times the likeliest. Default: 0.05."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Same seed, same answer.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")
]
ContextSize = Annotated[
    int | None, typer.Option("--context", metavar="N", help="Most tokens of prompt and answer.")
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory the engine may use, e.g. 48GB.")
]
RoutingTrace = Annotated[
    str | None,
    typer.Option(
        "--trace", metavar="FILE", help="Write which experts every token used, for ds4 bench."
    ),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")]
Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, metavar="N", help="TCP port. Default: 8000, none with --uds."),
]
UnixSocket = Annotated[
    str | None, typer.Option(metavar="PATH", help="Listen on this Unix socket, mode 0600.")
]
ApiKey = Annotated[
    str | None, typer.Option(metavar="KEY", envvar="DS4_API_KEY", help="What clients must send.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Let other machines connect without a key.")
]
Slots = Annotated[
    int, typer.Option(min=1, max=64, metavar="N", help="Answers written at the same time.")
]
Queue = Annotated[
    int, typer.Option(min=1, metavar="N", help="Requests that may wait; more are refused.")
]
ThinkFirst = Annotated[
    bool, typer.Option("--think/--no-think", help="Reason first where a request does not say.")
]
StrictModel = Annotated[bool, typer.Option("--strict-model", help="Refuse names of other models.")]
TraceFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Write down every prompt and answer, as JSON.")
]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Ignore unknown fields instead of refusing them.")
]
Origins = Annotated[
    list[str] | None,
    typer.Option(metavar="ORIGIN", help="A web page that may use the server. Repeatable."),
]
MaxBody = Annotated[str, typer.Option(metavar="SIZE", help="Longest body of a request.")]
KvMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory of conversations. Default: at most 4 GiB."),
]
Grace = Annotated[
    float, typer.Option(min=0, metavar="S", help="Seconds answers may take after SIGTERM.")
]

Kernels = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="metal: the GPU's own kernels; reference: plain MLX operations. Default: auto.",
    ),
]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft",
        help="Let the model's draft layer guess tokens that the model checks: the same answers.",
    ),
]
KvDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Keeps what was read for the next start; none: nowhere."),
]
KvSpace = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Disk space for them, 0 for none. Default: 8GB.")
]


@dataclass(frozen=True)
class ExpertChoice:
    """Where routed experts are and how they are streamed; None: the engine's default."""

    where: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="WHERE",
            help="Routed experts: resident, streamed from disk, or auto: as memory allows.",
        ),
    ] = None
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify-experts",
            metavar="WHEN",
            help="Check streamed experts, by checksum or, as GGUF files have none, by their "
            "scales: first (default: when first read), always, never.",
        ),
    ] = None
    swap: Annotated[
        float | None,
        typer.Option(
            "--swap-experts",
            metavar="F",
            help="Let experts in memory step in for absent ones within F of the score range, as "
            "0.05; changes the answers. Default: 0, exact.",
        ),
    ] = None
    prefetch: Annotated[
        str | None,
        typer.Option(
            "--prefetch",
            metavar="HOW",
            help="Read experts ahead: hash (default), those the token ids tell; router, also "
            "those the next layer's router guesses; off.",
        ),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            "--expert-policy",
            metavar="NAME",
            help="Which expert gives way to the next: lru (default), the longest unused, or "
            "decayed, the least used of late.",
        ),
    ] = None
    readers: Annotated[
        int | None,
        typer.Option(
            "--expert-readers",
            metavar="N",
            help="Experts read at the same time. Default: as many as the disk is best with.",
        ),
    ] = None


NO_EXPERT_CHOICE = ExpertChoice()


def with_experts(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command that takes `experts: ExpertChoice` an option for each of its fields."""
    options = inspect.signature(ExpertChoice, eval_str=True).parameters
    signature = inspect.signature(command, eval_str=True)
    shown: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        shown += options.values() if parameter.name == "experts" else [parameter]

    @wraps(command)
    def run(**given: Any) -> int:
        choice = ExpertChoice(**{name: given.pop(name) for name in options})
        return command(experts=choice, **given)

    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run
