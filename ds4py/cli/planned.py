"""`ds4 inspect` of a model that is not on this machine: what it would take, from its manifest."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds4py.hub.manifest import Manifest

RECIPES = ("2bit", "2bit-last6-q4", "4bit", "mxfp4")


def show(manifest: "Manifest") -> int:
    """Print the sizes of every shipped recipe and the classes of the default; the exit code."""
    for title, text in facts(manifest):
        print(f"{title:12}{text}".rstrip())
    print()
    print("\n".join(table(manifest)))
    return 0


def facts(manifest: "Manifest") -> Iterator[tuple[str, str]]:
    """Lines about the model, the download, and what `ds4 quantize` makes of it."""
    from ds4py import assets
    from ds4py.config import ModelConfig
    from ds4py.quant import sizes
    from ds4py.quant.recipe import Recipe
    from ds4py.sizes import format_size

    config = ModelConfig.from_dict(dict(manifest.config))
    yield "model", f"{manifest.name} (not on this machine; `ds4 pull {manifest.name}` fetches it)"
    yield "about", manifest.about
    yield "context", f"{config.max_position_embeddings} tokens at most"
    yield "download", f"{format_size(manifest.weight_bytes)} from {manifest.repo}"
    for number, name in enumerate(RECIPES):
        path = assets.path("models", "recipes", f"{name}.json")
        recipe = Recipe.load(path, len(config.layers))
        bundle = sizes.total(sizes.of_bundle(config, recipe))
        gguf = sizes.total(sizes.of_gguf(config, recipe))
        yield (
            "" if number else "recipes",
            f"{name:14} {format_size(bundle.n_bytes):>9} as a bundle, "
            f"{format_size(gguf.n_bytes):>9} as GGUF, {bundle.bits:.2f} bits a weight",
        )


def table(manifest: "Manifest") -> Iterator[str]:
    """Bytes and bits by class, as published and in the default bundle."""
    from ds4py.config import ModelConfig
    from ds4py.quant import sizes
    from ds4py.quant.recipe import Recipe
    from ds4py.sizes import format_size

    config = ModelConfig.from_dict(dict(manifest.config))
    before = sizes.published(config)
    after = sizes.of_bundle(config, Recipe.load(None, len(config.layers)))
    head = ("parameters", "published", "bits", "2bit", "bits")
    yield "{:14} {:>16} {:>10} {:>6} {:>10} {:>6}".format("tensors", *head)
    ordered = sorted(after.values(), key=lambda size: -size.n_bytes)
    for size in [*ordered, sizes.total(after)]:
        old = before.get(size.name) or sizes.total(before)
        yield (
            f"{size.name:14} {size.parameters:16,} {format_size(old.n_bytes):>10} {old.bits:6.2f} "
            f"{format_size(size.n_bytes):>10} {size.bits:6.2f}"
        )
