"""Every row of the table, at both scales, with its goals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from case import Case, Goal, Line


@dataclass(frozen=True)
class Request:
    """What the command line chose."""

    full: bool
    device: str
    pair: Mapping[str, Any] | None
    """A real pair of models with rows; None for random ones."""


PAIR = {
    "vocabulary": 32768,
    "length": 128,
    "source_layers": 8,
    "source_width": 512,
    "target_layers": 6,
    "target_width": 320,
}
SMALL_PAIR = {
    "vocabulary": 2048,
    "length": 16,
    "source_layers": 3,
    "source_width": 96,
    "target_layers": 2,
    "target_width": 64,
}
GROWTH = {
    "vocabulary": 8192,
    "length": 64,
    "rows": 32,
    "source_layers": 4,
    "source_width": 128,
    "target_layers": 4,
    "target_width": 128,
}
SMALL_GROWTH = SMALL_PAIR | {"rows": 8}
DOUBLED = {
    "rows": "rows",
    "length": "length",
    "depth": "target_layers",
    "width": "target_width",
    "vocabulary": "vocabulary",
}
"""Side of the growth row → the number that is doubled in it."""


def basis(request: Request) -> list[Case]:
    """The semantic basis against the pseudo-inverse."""
    goals = (Goal("time", 1 / 3.5), Goal("bound", 1.3))
    return [
        Case(
            row="basis",
            size=f"{entries:,} × {width:,}",
            module="rows_geometry",
            peer="torch.linalg.pinv",
            parameters={"entries": entries, "width": width},
            warm=_warm(request, {"entries": 2000, "width": 64}),
            sides={"ours": {}, "peer": {}, "bound": {}},
            lines=(Line(bound="bound", goals=goals),),
            tolerance=1e-3,
            gib=8 * entries * width * 4 / 2**30,
        )
        for entries, width in ([(152_064, 896), (32_000, 4096)] if request.full else [(2000, 64)])
    ]


def transport(request: Request) -> list[Case]:
    """A transport from two heads against two pseudo-inverses and a product."""
    sizes, small = {"entries": 151_936, "source_width": 1536, "target_width": 896}, _small_heads()
    return [
        Case(
            row="transport",
            size="{entries:,} × ({source_width:,} → {target_width:,})".format(**(sizes if request.full else small)),
            module="rows_geometry",
            peer="two pinv and a product",
            parameters=sizes if request.full else small,
            warm=_warm(request, small),
            lines=(Line(goals=(Goal("time", 1 / 5),)),),
            tolerance=1e-3,
            gib=5.0 if request.full else 0.0,
        )
    ]


def tokens(request: Request) -> list[Case]:
    """Transporting tokens, collapsed against explicit."""
    sizes = {"entries": 151_936, "source_width": 1536, "target_width": 896, "tokens": 4096}
    small = _small_heads() | {"tokens": 256}
    chosen = sizes if request.full else small
    return [
        Case(
            row="tokens",
            size="{tokens:,} tokens, {source_width:,} → {target_width:,}".format(**chosen),
            module="rows_geometry",
            peer="decompose, recompose",
            parameters=chosen,
            warm=_warm(request, small),
            lines=(Line(goals=(Goal("time", 1 / 20), Goal("memory", 1 / 50))),),
            tolerance=1e-3,
            gib=7.0 if request.full else 0.0,
        )
    ]


def relation(request: Request) -> list[Case]:
    """Relation distance against its formula in token space."""
    width = 896 if request.full else 32
    return [
        Case(
            row="relation",
            size=f"{count:,} tokens, width {width:,}",
            module="rows_geometry",
            peer="n × n Gram matrices",
            parameters={"tokens": count, "width": width},
            warm=_warm(request, {"tokens": 64, "width": 32}),
            tolerance=1e-3,
            gib=8 * count**2 * 4 / 2**30,
        )
        for count in ([256, 512, 1024, 2048, 4096, 8192] if request.full else [16, 64])
    ]


def cka(request: Request) -> list[Case]:
    """Linear CKA against a public package."""
    widths = {"target_width": 896, "source_width": 1536} if request.full else {"target_width": 32, "source_width": 48}
    chosen = [(512, "float32"), (4096, "float32"), (4096, "float64")] if request.full else [(64, "float64")]
    return [
        Case(
            row="cka",
            size=f"{count:,} tokens, {dtype}",
            module="rows_geometry",
            peer="ckatorch {ckatorch}",
            parameters={"tokens": count, "dtype": dtype, **widths},
            warm=_warm(request, {"tokens": 64, "dtype": dtype, "target_width": 32, "source_width": 48}),
            requires=("ckatorch",),
            tolerance=1e-3,
            gib=8 * count**2 * 8 / 2**30,
        )
        for count, dtype in chosen
    ]


def kl(request: Request) -> list[Case]:
    """Exact output KL in chunks against full logits."""
    sizes = {"entries": 151_936, "source_width": 1536, "target_width": 896}
    small = _small_heads() | {"tokens": 32}
    liger = request.device.startswith("cuda")
    line = Line(goals=(Goal("time", 1.1), Goal("memory", 1 / 4)))
    cases = []
    for chosen in [sizes | {"tokens": 1024}, sizes | {"tokens": 4096}] if request.full else [small]:
        shape = "{tokens:,} tokens × {entries:,}".format(**chosen)
        common: dict[str, Any] = {
            "row": "kl",
            "size": shape,
            "module": "rows_output",
            "parameters": chosen,
            # On CUDA kernels are compiled for the shape.
            "warm": chosen if liger else _warm(request, small),
            "tolerance": 1e-3,
        }
        needed = 6 * chosen["tokens"] * chosen["entries"] * 4 / 2**30
        cases.append(Case(peer="full logits", lines=(line,), gib=needed, **common))
        if liger:
            cases.append(
                Case(
                    peer="liger-kernel {liger-kernel}, head gradient too",
                    sides={"ours": {}, "liger": {}},
                    lines=(Line(peer="liger"),),
                    requires=("liger-kernel",),
                    **common,
                )
            )
    return cases


def attribution(request: Request) -> list[Case]:
    """Gradient × activation of every layer against captum."""
    batch_size = 4
    return [
        Case(
            row="attribution",
            size=f"{_name(request)}, batches of {batch_size}",
            module="rows_models",
            peer="captum {captum}",
            parameters={"pair": _pair(request, supervised=True), "batch_size": batch_size},
            warm=_warm(request, {"pair": SMALL_PAIR | {"supervised": True}, "batch_size": batch_size}),
            sides={"ours": {}, "peer": {}, "bound": {}},
            lines=(Line(bound="bound", goals=(Goal("time", 1.0), Goal("memory", 1.0), Goal("bound", 1.1))),),
            requires=("captum",),
            tolerance=1e-3,
        )
    ]


def frontier(request: Request) -> list[Case]:
    """Frontier training against joint distillation."""
    goals = (Goal("time", 1 / 2), Goal("memory", 1 / 2))
    peer_steps = 4 if request.pair or not request.full else 12
    return [
        Case(
            row="frontier",
            size=_name(request),
            module="rows_models",
            peer="joint KD, full logits",
            parameters={"pair": _pair(request, supervised=True), "peer_steps": peer_steps},
            warm=_warm(request, {"pair": SMALL_PAIR | {"supervised": True}, "peer_steps": 2}),
            sides={"supervision": {}, "ours": {}, "peer": {}},
            lines=(
                Line(goals=goals),
                Line(label=", supervision over 3 passes", plus="supervision", share=1 / 3, goals=goals),
            ),
            unit="1,000 tokens",
        )
    ]


def transfer(request: Request) -> list[Case]:
    """The whole transfer against TRL's trainer."""
    more = {} if request.pair or not request.full else {"rows": 32}
    return [
        Case(
            row="transfer",
            size=_name(request),
            module="rows_models",
            peer="trl {trl} GKDTrainer",
            parameters={"pair": _pair(request, supervised=False) | more},
            warm=_warm(request, {"pair": SMALL_PAIR | {"supervised": False}}),
            lines=(Line(goals=(Goal("time", 1 / 2), Goal("memory", 1 / 2))),),
            requires=("trl",),
            unit="1,000 tokens",
        )
    ]


def growth(request: Request) -> list[Case]:
    """Frontier training of a model that is doubled in one respect, beside the same undoubled."""
    base = (GROWTH if request.full else SMALL_GROWTH) | {"supervised": True}
    doubled = {side: base | {number: 2 * base[number]} for side, number in DOUBLED.items()}
    return [
        Case(
            row="growth",
            size="target ",
            module="rows_models",
            peer="undoubled",
            parameters={},
            warm=_warm(request, {"pair": SMALL_PAIR | {"supervised": True}}),
            sides={"base": {"pair": base}, **{side: {"pair": pair} for side, pair in doubled.items()}},
            function="growth",
            lines=tuple(
                Line(ours=side, peer="base", label=f"{side}: {base[number]:,} doubled")
                for side, number in DOUBLED.items()
            ),
        )
    ]


COMMANDS = (
    "--help",
    "--version",
    "unknown",
    "run --help",
    "compare --help",
    "presets",
    "models list",
    "store list",
    "run unknown",
    "run tiny train.unknown=1",
    "run tiny train.batch_size=-1",
    "run missing.yaml",
    "report missing",
    "run tiny --dry-run",
)
"""Commands whose start-up is measured: help and lists, mistakes, and a plan."""


def startup(request: Request) -> list[Case]:
    """A command that trains nothing, or the import of a package, against the import of torch."""
    packages = [f"semalign_{name}" for name in ("geometry", "attribution", "align", "train")]
    chosen = [(name, "ours") for name in COMMANDS] + [(name, "import") for name in packages]
    return [
        Case(
            row="startup",
            size=f"{'import ' if side == 'import' else ''}{command}",
            module="rows_startup",
            peer="import torch",
            parameters={"command": command},
            warm=None,
            sides={side: {}, "peer": {}},
            lines=(Line(ours=side),),
        )
        for command, side in (chosen if request.full else chosen[:1])
    ]


ROWS: dict[str, Callable[[Request], list[Case]]] = {
    row.__name__: row
    for row in (basis, transport, tokens, relation, cka, kl, attribution, frontier, transfer, growth, startup)
}
"""What `--rows` can name."""


def _warm(request: Request, small: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A smoke needs no warm-up."""
    return small if request.full else None


def _small_heads() -> dict[str, Any]:
    return {"entries": 2000, "source_width": 64, "target_width": 48}


def _pair(request: Request, *, supervised: bool) -> dict[str, Any]:
    chosen = request.pair or (PAIR if request.full else SMALL_PAIR)
    return {**chosen, "supervised": supervised}


def _name(request: Request) -> str:
    if request.pair:
        return "the given pair"
    chosen = PAIR if request.full else SMALL_PAIR
    return "{source_layers} × {source_width} → {target_layers} × {target_width}, v {vocabulary:,}".format(**chosen)
