"""Draws flow.svg: what becomes of wafer maps, and which library does it.

python docs/flow.py
"""

from __future__ import annotations

from pathlib import Path

STEPS = [  # what happens, by whom, what comes out
    ("wafer maps", "LSWMD.pkl, .npz, images, or generated", ""),
    ("split", "by lot: none is in two parts", "train, validation, test"),
    ("search", "Optuna, on Lightning's trainings", "settings, and a winner that goes on"),
    ("train", "Lightning: torchvision, ultralytics, your own", "the best epoch, by validation"),
    ("score", "once, on test lots that nothing has seen", "macro F1 with its interval"),
    ("register", "MLflow: champion or challenger", "one ONNX file with its promises"),
    ("answer", "ONNX Runtime: files, HTTP, a browser", "class, set, or “look at it”"),
]
WIDTH, BOX, GAP = 720, 56, 18
STYLE = """
  rect { fill: #eef3f8; stroke: #35618e; stroke-width: 1.5 }
  text { font-family: system-ui, sans-serif; font-size: 15px; fill: #1b2733 }
  .name { font-weight: 600 }
  .out { fill: #45586b; font-size: 13px }
  path { stroke: #35618e; stroke-width: 1.5; fill: none }
  .page { fill: #ffffff; stroke: none }
"""


def draw() -> str:
    """The picture, on a ground of its own, so that it is legible on dark pages as well."""
    height = len(STEPS) * (BOX + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>From wafer maps to answers, and which library does what</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
    ]
    for number, (name, by, out) in enumerate(STEPS):
        top = GAP + number * (BOX + GAP)
        parts.append(f'<rect x="20" y="{top}" width="{WIDTH - 40}" height="{BOX}" rx="8"/>')
        parts.append(f'<text class="name" x="40" y="{top + 34}">{name}</text>')
        parts.append(f'<text x="150" y="{top + (25 if out else 34)}">{by}</text>')
        if out:
            parts.append(f'<text class="out" x="150" y="{top + 45}">→ {out}</text>')
        if number:
            parts.append(f'<path d="M 360 {top - GAP} V {top - 3} m -5 -6 l 5 6 l 5 -6"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("flow.svg").write_text(draw())
