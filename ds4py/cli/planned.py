"""`ds4 inspect` of a model that is not on this machine: what it would take, from its manifest."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4py.cli.layout import memory_lines, memory_report

if TYPE_CHECKING:
    from ds4py.config import ModelConfig
    from ds4py.engine.footprint import Numerics
    from ds4py.engine.memory import MemoryPlan
    from ds4py.errors import OptionsError
    from ds4py.hub.manifest import Manifest
    from ds4py.quant.sizes import Sizes

RECIPES = ("2bit", "2bit-last6-q4", "4bit", "mxfp4")


class Planned:
    """A model's default bundle, or its GGUF file, before anything is fetched, as a Mac would run
    it."""

    def __init__(self, manifest: "Manifest", context: int | None, memory: str | None):
        from ds4py.config import ModelConfig
        from ds4py.engine.memory import plan_recipe
        from ds4py.quant import sizes
        from ds4py.quant.recipe import Recipe

        self.manifest = manifest
        self.config: ModelConfig = ModelConfig.from_dict(dict(manifest.config))
        recipe = Recipe.load(None, len(self.config.layers))
        self.published: Sizes = sizes.published(self.config)
        made = sizes.of_gguf if manifest.is_gguf else sizes.of_bundle
        self.made: Sizes = made(self.config, recipe)
        kept = (size for name, size in self.made.items() if name != "draft layers")
        self.dense = sum(size.n_bytes for size in kept if not size.name.startswith("routed."))
        experts = [f"layers.{i}.ffn.experts.0" for i in range(len(self.config.layers))]
        formats = [
            (
                recipe.format_of(f"{name}.w1.weight"),
                recipe.format_of(f"{name}.w3.weight"),
                recipe.format_of(f"{name}.w2.weight"),
            )
            for name in experts
        ]
        self.numerics: Numerics
        self.plan: MemoryPlan | OptionsError
        largest = max(self.made[name].n_bytes for name in ("embed", "head"))
        self.numerics, self.plan = plan_recipe(
            self.config, formats, self.dense, largest, context, memory
        )

    @property
    def read_bytes(self) -> tuple[int, int]:
        """What one decoded token reads of the weights: dense ones, and routed experts."""
        c = self.config
        routed = sum(s.n_bytes for n, s in self.made.items() if n.startswith("routed."))
        used = routed * c.num_experts_per_tok // c.n_routed_experts
        return self.dense - self.made["embed"].n_bytes, used


def show(planned: Planned) -> None:
    """Print the sizes of every shipped recipe, the memory, and the classes of the default."""
    for title, text in [
        *facts(planned),
        *memory_lines(planned.config, planned.numerics, planned.plan),
        *speed(planned),
    ]:
        print(f"{title:12}{text}".rstrip())
    print()
    print("\n".join(table(planned)))


def facts(planned: Planned) -> Iterator[tuple[str, str]]:
    """Lines about the model, the download, and what `ds4 quantize` makes of it."""
    from ds4py.sizes import format_size

    manifest, config = planned.manifest, planned.config
    yield "model", f"{manifest.name} (not on this machine; `ds4 pull {manifest.name}` fetches it)"
    yield "about", manifest.about
    yield "context", f"{config.max_position_embeddings} tokens at most"
    yield "download", f"{format_size(manifest.weight_bytes)} from {manifest.repo}"
    for number, recipe in enumerate(() if manifest.is_gguf else recipes(config)):
        yield (
            "" if number else "recipes",
            f"{recipe['name']:14} {format_size(recipe['bundle_bytes']):>9} as a bundle, "
            f"{format_size(recipe['gguf_bytes']):>9} as GGUF, "
            f"{recipe['bits_per_weight']:.2f} bits a weight",
        )


def recipes(config: "ModelConfig") -> Iterator[dict[str, Any]]:
    """What each shipped recipe makes of the model."""
    from ds4py import assets
    from ds4py.quant import sizes
    from ds4py.quant.recipe import Recipe

    for name in RECIPES:
        path = assets.path("models", "recipes", f"{name}.json")
        recipe = Recipe.load(path, len(config.layers))
        bundle = sizes.total(sizes.of_bundle(config, recipe))
        yield {
            "name": name,
            "bundle_bytes": bundle.n_bytes,
            "gguf_bytes": sizes.total(sizes.of_gguf(config, recipe)).n_bytes,
            "bits_per_weight": bundle.bits,
        }


def speed(planned: Planned) -> Iterator[tuple[str, str]]:
    """What bounds decoding: bytes a token reads, over the bandwidth of memory and of the disk."""
    from ds4py.errors import OptionsError
    from ds4py.sizes import format_size

    dense, routed = planned.read_bytes
    total = dense + routed
    yield (
        "speed",
        f"a token reads {format_size(total)} of weights, so at most {100e9 / total:.1f} tokens a "
        "second for every 100 GB/s of memory bandwidth",
    )
    plan = planned.plan
    if isinstance(plan, OptionsError) or not plan.streamed:
        return
    n_experts = planned.config.n_routed_experts * len(planned.config.layers)
    missing = 1 - sum(part.n_cached for part in plan.slots) / n_experts
    absent = int(routed * missing)
    yield (
        "",
        f"of it {format_size(absent)} from disk, were every expert as likely as any other: "
        f"{1e9 / absent:.1f} tokens a second for every GB/s of the disk; reuse makes it less",
    )


def report(planned: Planned) -> dict[str, Any]:
    """The same for scripts. Sizes in bytes."""
    manifest = planned.manifest
    dense, routed = planned.read_bytes
    return {
        "model": manifest.name,
        "here": False,
        "family": "DeepSeek V4",
        "context": planned.config.max_position_embeddings,
        "repository": manifest.repo,
        "download_bytes": manifest.weight_bytes,
        "recipes": [] if manifest.is_gguf else list(recipes(planned.config)),
        "bytes_per_token": {"dense": dense, "experts": routed},
        "classes": [
            {
                "name": size.name,
                "tensors": size.tensors,
                "parameters": size.parameters,
                "bytes": size.n_bytes,
                "bits_per_weight": size.bits,
            }
            for size in planned.made.values()
        ],
        "memory": memory_report(planned.config, planned.numerics, planned.plan),
    }


def table(planned: Planned) -> Iterator[str]:
    """Bytes and bits by class, as published and as fetched or quantised."""
    from ds4py.quant import sizes
    from ds4py.sizes import format_size

    before, after = planned.published, planned.made
    made = "GGUF" if planned.manifest.is_gguf else "2bit"
    head = ("parameters", "published", "bits", made, "bits")
    yield "{:14} {:>16} {:>10} {:>6} {:>10} {:>6}".format("tensors", *head)
    ordered = sorted(after.values(), key=lambda size: -size.n_bytes)
    for size in [*ordered, sizes.total(after)]:
        old = before.get(size.name) or sizes.total(before)
        yield (
            f"{size.name:14} {size.parameters:16,} {format_size(old.n_bytes):>10} {old.bits:6.2f} "
            f"{format_size(size.n_bytes):>10} {size.bits:6.2f}"
        )
