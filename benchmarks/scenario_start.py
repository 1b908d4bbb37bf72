"""Makes the weights before round 1 of a seed, once for all its jobs, as the product itself would.

python benchmarks/scenario_start.py RECIPE.toml STEPS DEVICE SEED OPTIONS FILE.safetensors
OPTIONS are the backbone's, in JSON. A study of the same recipe with these, phantom steps and seed
has the same file: RUN/round-0000.safetensors. Killed and run again it goes on where it was.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    # Here, because the processes that draw phantoms import this file, and torch takes them longer.
    from federation_loop import changed

    from core.checkpoint import save_arrays
    from core.config import load_recipe
    from core.initial import initial_state

    recipe_file, steps, device, seed, options, out = sys.argv[1:]
    recipe = load_recipe(Path(recipe_file)).model_copy(update={"seed": int(seed)})
    recipe = changed(recipe, model={"phantom_steps": int(steps), "options": json.loads(options)})
    keep = Path(f"{out}.pretraining")
    save_arrays(Path(out), initial_state(recipe, device=device, keep=keep).to_arrays())
    keep.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
