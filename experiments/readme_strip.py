"""Draw the README's strip from a finished demo: photos of the concept, and what the model draws before and after.

    pyunictokens demo --seed 1 --out demo
    python -m experiments.readme_strip demo              # writes docs/images/before_after.png

Nothing is picked: the columns are the first reference images, and the first image of the first held-out prompts as the
model draws them that never saw the concept, with its tokens learned, and reinforced; the same noise in each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from pyunictokens.data.images import from_pil, make_grid, save_image
from pyunictokens.evaluate.result import REFERENCES, EvalResult

from .demo_seeds import TITLES

OUT = Path(__file__).parent.parent / "docs" / "images" / "before_after.png"
TASK, PROMPTS, TILE = "reasoning_generation", 4, 190


def strip(run: Path) -> Image.Image:
    """The strip of the demo in `run`: a row of reference images, and one for each evaluation there is."""
    results = {name: EvalResult.load(run / f"{name}.json") for name in TITLES if (run / f"{name}.json").is_file()}
    first = results["base"]
    hints = [record["prompt"].partition(f"<{first.concept}> ")[2] for record in first.records[TASK][:PROMPTS]]
    rows = [(f"photo {n + 1}", first.images[REFERENCES][0][n]) for n in range(PROMPTS)]
    for name, result in results.items():
        rows += [(f"{TITLES[name]}: {hint}", result.images[TASK][n][0]) for n, hint in enumerate(hints)]
    pixels = [from_pil(Image.fromarray(image.permute(1, 2, 0).numpy())) for _, image in rows]
    return make_grid(pixels, PROMPTS, [caption for caption, _ in rows], tile=TILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a demo")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    save_image(strip(options.run), options.out)
    prompts = [record["prompt"] for record in EvalResult.load(options.run / "base.json").records[TASK][:PROMPTS]]
    print(f"{options.out}: {'; '.join(prompts)}")


if __name__ == "__main__":
    main()
