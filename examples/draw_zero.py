"""Draw docs/images/zero.png and print the counts of docs/zero.md: which state lives where.

    python examples/draw_zero.py

Counted, not measured, for Llama-3.1-8B in bf16 at daa_rank 512 on 16 ranks: bytes per rank.
"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from daa_ext.gathered import BUCKET_BYTES
from daa_ext.lowrank import factors_pay

RANKS, RANK, LAYERS, HIDDEN, INNER, VOCABULARY = 16, 512, 32, 4096, 14336, 128256
GB = 1e9
LAYER = [(HIDDEN, HIDDEN)] * 2 + [(1024, HIDDEN)] * 2 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
SHAPES = [(VOCABULARY, HIDDEN)] * 2 + LAYER * LAYERS + [(HIDDEN,)] * (2 * LAYERS + 1)
OUT = Path(__file__).parent.parent / "docs/images/zero.png"


def elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def counts() -> dict[str, float]:
    """Parameters, anchor bytes, and what one optimizer step multiplies and gathers."""
    factorized = [shape for shape in SHAPES if factors_pay(shape, RANK)]
    dense = [shape for shape in SHAPES if not factors_pay(shape, RANK)]
    vt = sum(4 * RANK * shape[1] for shape in factorized)
    u = sum(4 * RANK * shape[0] for shape in factorized)
    return {
        "parameters": sum(elements(shape) for shape in SHAPES),
        "anchor": u + vt + sum(4 * elements(shape) for shape in dense),
        "vt": vt,
        # <g, U S Vt> and g + U S Vt: two products of 2 R M N operations each
        "operations": sum(2 * 2 * RANK * elements(shape) for shape in factorized),
    }


def per_rank(anchor: float, parameters: float) -> dict[str, dict[str, float]]:
    """{stage: {state: bytes per rank}} in bf16 with Adam."""
    share = 1 / RANKS
    return {
        stage: {
            "bf16 weights": 2 * parameters * weights,
            "bf16 gradients": 2 * parameters * gradients,
            "fp32 weights, Adam m and v": 12 * parameters * optimizer,
            "anchor": anchor * optimizer,
            "buffer for Vt": BUCKET_BYTES if stage == "ZeRO-3" else 0.0,
        }
        for stage, weights, gradients, optimizer in (
            ("ZeRO-0", 1, 1, 1),
            ("ZeRO-1", 1, 1, share),
            ("ZeRO-2", 1, share, share),
            ("ZeRO-3", share, share, share),
        )
    }


def draw(stages: dict[str, dict[str, float]]) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole, zoomed = figure.subplots(1, 2, width_ratios=(1, 1))
    colours = ("#9db8d9", "#5f8dc4", "#2f5b94", "#e07b39", "#f3c9a8")
    for axis, names in ((whole, list(stages)), (zoomed, list(stages)[1:])):
        below = [0.0] * len(names)
        for state, colour in zip(stages["ZeRO-0"], colours, strict=True):
            sizes = [stages[name][state] / GB for name in names]
            axis.bar(names, sizes, bottom=below, color=colour, label=state, width=0.6)
            below = [a + b for a, b in zip(below, sizes, strict=True)]
        for name, total in zip(names, below, strict=True):
            anchor = (stages[name]["anchor"] + stages[name]["buffer for Vt"]) / GB
            axis.annotate(
                f"{total:.1f} GB\nanchor {anchor:.2f}", (name, total), ha="center", va="bottom"
            )
        axis.set_ylabel("GB per rank")
        axis.set_ylim(0, 1.2 * max(below))
        axis.spines[["top", "right"]].set_visible(False)
    whole.set_title("8B parameters, 16 ranks, bf16, daa_rank 512")
    zoomed.set_title("the sharded stages")
    zoomed.legend(fontsize="small", loc="upper right")
    figure.savefig(OUT, dpi=110)


def main() -> None:
    found = counts()
    stages = per_rank(found["anchor"], found["parameters"])
    draw(stages)
    print(f"parameters {found['parameters']:,}")
    print(f"anchor {found['anchor'] / GB:.2f} GB, of it Vt {found['vt'] / GB:.2f} GB")
    print(f"per rank: {found['operations'] / RANKS / 1e12:.2f} TFLOP a step in fp32")
    gathered = found["vt"] * (RANKS - 1) / RANKS
    print(f"ZeRO-3: {2 * gathered / GB:.2f} GB of Vt received per rank and step")
    for stage, states in stages.items():
        words = ", ".join(f"{name} {size / GB:.2f}" for name, size in states.items() if size)
        print(f"{stage}: {words}; together {sum(states.values()) / GB:.2f} GB")


if __name__ == "__main__":
    main()
