"""`ds4 quantize` and `ds4 imatrix`: make a smaller model, and measure what matters in one."""

import sys
from pathlib import Path

from ds4py.cli.model import open_engine, tokenizer_of
from ds4py.cli.progress import ByteProgress, ProgressBar
from ds4py.cli.settings import ModelChoice, Settings, read_file
from ds4py.errors import InputError, OptionsError

KINDS = ("bundle", "gguf")


def run(source: str, target: str, kind: str, recipe: str | None, imatrix: str | None) -> int:
    """Convert a model into a bundle or a GGUF file; the exit code. Its path goes to stdout."""
    from ds4py.engine.engine import resolve
    from ds4py.quant import imatrix as importance
    from ds4py.quant.convert import Converter
    from ds4py.quant.recipe import Recipe
    from ds4py.quant.to_gguf import Exporter
    from ds4py.weights.files import ModelFiles

    if kind not in KINDS:
        raise OptionsError(f"--to is {kind!r}; there are {' and '.join(KINDS)}")
    files = ModelFiles.at(resolve(source))
    plan = Recipe.load(Path(recipe) if recipe else None, len(files.config.layers))
    weights = importance.load(Path(imatrix)) if imatrix else {}
    place = Path(target)
    with ByteProgress(sys.stderr) as progress:
        if kind == "gguf":
            Exporter(files, place, plan, weights, progress).run()
        else:
            Converter(files.parts(), place, plan, weights, progress).run()
    print(place.absolute())
    return 0


def run_imatrix(source: str, corpus: str, target: str, piece: int) -> int:
    """Collect importance over a text file; the exit code. The file's path goes to stdout."""
    from ds4py.quant import imatrix
    from ds4py.text.messages import BOS, spelled

    text = read_file(corpus)
    if not Path(target).absolute().parent.is_dir():
        raise InputError(f"the folder of {target} does not exist; make it first")
    engine, _ = open_engine(Settings(model=ModelChoice(source, None)))
    tokenizer = tokenizer_of(engine)
    texts = [
        [tokenizer.bos_id, *ids[at : at + piece]]
        for document in text.split(BOS)
        for ids in [tokenizer.encode(spelled(document))]
        for at in range(0, len(ids), piece)
    ]
    with ProgressBar(sys.stderr) as progress:
        imatrix.save(Path(target), imatrix.collect(engine, texts, progress))
    print(Path(target).absolute())
    return 0
