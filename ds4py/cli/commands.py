"""The commands of `ds4` and their options. `ds4 --help` is the reference.

Each command's work lives in a module of its own, imported when the command runs: help answers
without loading any of it.
"""

from typing import Annotated

import typer

from ds4py import __version__
from ds4py.cli import experts as streaming
from ds4py.cli import settings as given
from ds4py.cli.arguments import (
    NO_EXPERT_CHOICE,
    ApiKey,
    ContextSize,
    Draft,
    ExpertChoice,
    Grace,
    Host,
    Insecure,
    Kernels,
    KvDir,
    KvMemory,
    KvSpace,
    Lenient,
    MaxBody,
    MaxTokens,
    Memory,
    MinP,
    Model,
    ModelArgument,
    Origins,
    Port,
    Prompt,
    Queue,
    Raw,
    RoutingTrace,
    Seed,
    Slots,
    Stop,
    StrictModel,
    System,
    Temperature,
    ThinkFirst,
    ThinkMax,
    TopK,
    TopP,
    TraceFile,
    UnixSocket,
    with_experts,
)
from ds4py.cli.cache import cache
from ds4py.cli.settings import Settings
from ds4py.errors import OptionsError

app = typer.Typer(
    name="ds4",
    help="Run DeepSeek V4 models on this machine.",
    add_completion=False,
    # Plain help: drawing it with rich takes longer than all the rest of `ds4 --help`.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ds4 {__version__}")
        raise typer.Exit


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _help_without_command(context)


@app.command(short_help="Answer one prompt.")
@with_experts
def generate(
    prompt: Prompt = None,
    model: Model = None,
    system: System = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Reason before answering. Default: --no-think."),
    ] = None,
    think_max: ThinkMax = False,
    raw: Raw = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    context: ContextSize = None,
    memory: Memory = None,
    experts: ExpertChoice = NO_EXPERT_CHOICE,
    trace: RoutingTrace = None,
    kernels: Kernels = None,
    draft: Draft = False,
    kv_dir: KvDir = None,
    kv_space: KvSpace = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print times to stderr.")] = False,
) -> int:
    """Answer one prompt. The answer goes to stdout and nothing else does. Without PROMPT, or with
    -, the prompt is read from stdin.

    Reasoning is off unless asked for: a script wants the answer, and --max-tokens counts both.
    On a terminal reasoning is shown dimmed, on stderr.
    """
    thinking, effort = given.thinking_mode(think, think_max)
    if raw and (system is not None or think is not None or think_max):
        raise OptionsError("--raw sends the prompt alone; drop --system and --think")
    settings = Settings(
        model=given.choose_model(model),
        system=given.read_system(system),
        thinking=thinking,
        effort=effort,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=given.stop_texts(stop),
        context=context,
        memory=memory,
        experts=experts,
        kernels=kernels,
        draft=draft,
        kv_dir=kv_dir,
        kv_space=kv_space,
    )
    from ds4py.cli.generate import run

    return run(prompt, settings, raw, json, stats, trace)


@app.command(short_help="Talk with a model.")
@with_experts
def chat(
    model: Model = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a conversation saved by /save.")
    ] = None,
    system: System = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Reason before answering. Default: --think."),
    ] = None,
    think_max: ThinkMax = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    context: ContextSize = None,
    memory: Memory = None,
    experts: ExpertChoice = NO_EXPERT_CHOICE,
    kernels: Kernels = None,
    draft: Draft = False,
    kv_dir: KvDir = None,
    kv_space: KvSpace = None,
) -> int:
    """Talk with a model. /help lists what else can be typed.

    Ctrl-C stops an answer and keeps the conversation; Ctrl-D ends it. With a pipe on stdin every
    line is one message.
    """
    thinking, effort = given.thinking_mode(think, think_max)
    settings = Settings(
        model=given.choose_model(model),
        system=given.read_system(system),
        thinking=thinking,
        effort=effort,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=given.stop_texts(stop),
        context=context,
        memory=memory,
        experts=experts,
        kernels=kernels,
        draft=draft,
        kv_dir=kv_dir,
        kv_space=kv_space,
    )
    from ds4py.cli.chat import run

    return run(settings, resume)


@app.command(short_help="Answer over HTTP: OpenAI's and Anthropic's APIs.")
@with_experts
def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    uds: UnixSocket = None,
    api_key: ApiKey = None,
    insecure: Insecure = False,
    slots: Slots = 4,
    queue: Queue = 64,
    think: ThinkFirst = True,
    strict_model: StrictModel = False,
    lenient: Lenient = False,
    trace: TraceFile = None,
    allow_origin: Origins = None,
    max_body: MaxBody = "64MB",
    kv_memory: KvMemory = None,
    kv_dir: KvDir = None,
    kv_space: KvSpace = None,
    grace: Grace = 10.0,
    context: ContextSize = None,
    memory: Memory = None,
    experts: ExpertChoice = NO_EXPERT_CHOICE,
    kernels: Kernels = None,
    draft: Draft = False,
) -> int:
    """Answer over HTTP: chat completions, completions, responses and messages.

    Ctrl-C or SIGTERM stops it: answers may finish for a while, then it ends. With --uds and no
    --port there is no TCP.
    """
    settings = Settings(
        model=given.choose_model(model),
        context=context,
        memory=memory,
        experts=experts,
        kernels=kernels,
        draft=draft,
        kv_dir=kv_dir,
        kv_space=kv_space,
    )
    from ds4py.cli.serve import ServeOptions, run

    options = ServeOptions(
        host=host,
        port=8000 if port is None and uds is None else port,
        uds=uds,
        api_key=api_key,
        insecure=insecure,
        slots=slots,
        queue=queue,
        thinking=think,
        strict_model=strict_model,
        lenient=lenient,
        trace=trace,
        origins=tuple(allow_origin or ()),
        max_body=max_body,
        kv_memory=kv_memory,
        grace_s=grace,
    )
    return run(settings, options)


@app.command(short_help="Show what a model is.")
def inspect(
    model: ModelArgument = None,
    context: ContextSize = None,
    memory: Memory = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Show what a model is: parts, layers, tensors, and where its memory goes on this machine.

    Reads the configuration and the tensors' headers, not the weights.
    """
    from ds4py.cli.inspect import run

    return run(given.choose_model(model), context, memory, json)


@app.command(short_help="Measure a model's skills.")
def verify(
    model: ModelArgument = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, metavar="N", help="Questions per skill.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Picks the questions.")] = 77,
) -> int:
    """Measure the skills the embedded model was trained for, on prompts it has never seen.

    Prints a table and, as the last line, JSON. The exit code is 0 when every target is met.
    """
    from ds4py.cli.evaluate import run

    return run(given.choose_model(model), samples, seed)


@app.command(short_help="Fetch a model.")
def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|REPO",
            show_default=False,
            help="flash, pro, flash-gguf, or a repository of the hub: ORG/REPO or ORG/REPO/FILE.",
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="Branch, tag or commit of the repository.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Put the files there. Default: NAME in $DS4_MODELS."),
    ] = None,
    token: Annotated[
        str | None, typer.Option(metavar="T", help="Hub token. Default: that of `hf auth login`.")
    ] = None,
) -> int:
    """Fetch a model from the Hugging Face hub and check every file. Prints the model's directory.

    It can be stopped at any time: the same command goes on where it was, and until all is checked
    there is no model. Afterwards --model takes the NAME.
    """
    from ds4py.cli.pull import run

    return run(name, revision, to, token)


@app.command(short_help="Make a model smaller.")
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Name, directory or GGUF file of a model.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="The new model's directory or GGUF file.")
    ],
    to: Annotated[
        str, typer.Option(metavar="KIND", help="bundle, or gguf as antirez/ds4 reads it.")
    ] = "bundle",
    recipe: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Formats by class and layer (JSON). Default: 2-bit."),
    ] = None,
    imatrix: Annotated[
        str | None, typer.Option(metavar="FILE", help="Importance made by `ds4 imatrix`.")
    ] = None,
) -> int:
    """Convert a model into a bundle: routed experts at 2 bits, what every token reads at 8.

    It can be stopped at any time: the same command goes on where it was, and until all is done
    there is no model.
    """
    from ds4py.cli.quantize import run

    return run(source, target, to, recipe, imatrix)


@app.command(short_help="Measure which weights matter.")
def imatrix(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Name or directory of a model.")],
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="A UTF-8 text file.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The file to write.")],
    piece: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens read at a time, each piece by itself.")
    ] = 512,
) -> int:
    """Run a text through a model and note how strongly each channel of each expert is driven.

    What spells a control token in the text is one; a new document begins where a sequence does.
    """
    from ds4py.cli.quantize import run_imatrix

    return run_imatrix(source, corpus, target, piece)


cache.callback(invoke_without_command=True)(_help_without_command)
app.add_typer(cache, name="cache", short_help="Look after the sessions kept on disk.")

bench = typer.Typer(
    help="Measure the engine.",
    rich_markup_mode=None,
    invoke_without_command=True,
    callback=_help_without_command,
)
app.add_typer(bench, name="bench", short_help="Measure the engine.")


@bench.command(short_help="Measure tokens per second.")
def speed(
    model: Model = None,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens to decode at each position.")
    ] = 64,
    repeat: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of each; the median counts.")
    ] = 3,
    kernels: Kernels = None,
    draft: Draft = False,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> int:
    """Measure tokens per second: decoding near and far into the context, and reading prompts.

    Prints a table and, as the last line, JSON with the machine and the version.
    """
    from ds4py.cli.bench import run_speed

    settings = Settings(given.choose_model(model), kernels=kernels, draft=draft)
    return run_speed(settings, tokens, repeat, json)


bench.command("experts", short_help="Measure streamed experts.")(streaming.bench)


@bench.command(short_help="Count a step's launches and bytes.")
def kernels(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|config.json",
            show_default=False,
            help="Name, directory, or the config.json of a model that is not here.",
        ),
    ] = None,
    at: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens before the step. Repeatable. Default: 1000, 100000 and 1000000.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> int:
    """Count what the Metal kernels launch and read for one token, and time building a step.

    Nothing is computed, so a config.json is enough, and no GPU is needed: weights count as the
    default recipe stores them. After the last N, steps of several sequences and of a prompt's
    chunk are counted, too. On a Mac a model that is there is timed, too, against how fast its
    GPU reads memory. Prints tables and, as the last line, JSON.
    """
    from ds4py.cli.bench import run_kernels

    return run_kernels(given.choose_model(model), at or [], json)


@bench.command(short_help="Measure the quantisers.")
def encode(
    weights: Annotated[
        int, typer.Option(min=1, metavar="N", help="Weights to encode, in rows of 2048.")
    ] = 1 << 20,
    repeat: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of each; the median counts.")
    ] = 3,
) -> int:
    """Measure weights per second and error of every block format, on made-up weights.

    Prints a table and, as the last line, JSON with the machine and the version.
    """
    from ds4py.cli.bench import run_encode

    return run_encode(weights, repeat)


@bench.command(short_help="Measure sessions on disk.")
def kv(
    model: Model = None,
    repeat: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of each; the median counts.")
    ] = 3,
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="Replay a day of agents under each rule.")
    ] = True,
    kernels: Kernels = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> int:
    """Measure restoring a prompt against reading it, saving a turn, and what eviction loses.

    Prints tables and, as the last line, JSON with the machine and the version.
    """
    from ds4py.cli.bench import run_kv

    return run_kv(Settings(given.choose_model(model), kernels=kernels), repeat, trace, json)
