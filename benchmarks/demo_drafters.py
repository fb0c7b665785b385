"""Train every drafter of the embedded target that docs/RESULTS.md compares:

    python benchmarks/demo_drafters.py [GROUP ...]

The recipes of a group are trained together. Groups run in the order in which they need each other; what is finished is
passed over, what was stopped goes on. What makes the answers they learn from: configs/demo_eagle2.py.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from jaxspec.training import Recipe, Stopped, run
from jaxspec.training.recipe import load_recipe

PRIMITIVES = ("pruning", "pooling", "convolution", "resampler", "text_only")


def recipe(config: str, name: str | None = None, **changes) -> Recipe:
    """The packaged one under another name with other values."""
    base = load_recipe(config)
    return dataclasses.replace(base, name=name or base.name, **changes)


def specvlm(name: str, mode: str, **changes) -> Recipe:
    """demo_specvlm with another mode of its compressor."""
    compressor = dataclasses.replace(recipe("demo_specvlm").compressor, mode=mode)
    return recipe("demo_specvlm", name, compressor=compressor, **changes)


def heads() -> Sequence[Recipe]:
    """What reads the target's features from the first step on, five epochs."""
    modes = [specvlm(f"demo_specvlm_{mode}", mode) for mode in ("weighted", "concat")]
    names = ("demo_eagle2", "demo_eaglevlm", "demo_medusa", "demo_specvlm")
    return [*map(recipe, names), *modes]


def primitives() -> Sequence[Recipe]:
    """SpecVLM's primitives one by one, two epochs."""
    changes = {"steps": 368, "acceptance_every": 0}
    return [specvlm(f"ablation_{mode}", mode, **changes) for mode in PRIMITIVES]


def massv1() -> Sequence[Recipe]:
    return [recipe("demo_massv1")]


def massv2() -> Sequence[Recipe]:
    """MASSV's second phase, and the same text model without images."""
    return [recipe("demo_massv2"), recipe("demo_massv2", "demo_massv_text", phase=0, init_from="runs/demo_lm/export")]


def vispec() -> Sequence[Recipe]:
    """Stage 2, with and without its multi-step run."""
    return [recipe("demo_vispec"), recipe("demo_vispec", "ablation_distilled", mtp_steps=0)]


def improvements() -> Sequence[Recipe]:
    """One epoch more of ViSpec: as it was, with each of our improvements, and with all of them."""
    changes = {"steps": 184, "learning_rate": 3e-4, "init_from": "runs/demo_vispec/export", "seed": 2}
    taps, accepted = {"tap_layers": (3, 6, 9)}, {"acceptance_weight": 5.0}
    steps, tokens = {"mtp_steps": 2}, {"draft_vocab_size": 192}
    return [
        recipe("demo_vispec", "vispec_longer", **changes),
        recipe("demo_vispec", "vispec_taps", **changes, **taps),
        recipe("demo_vispec", "vispec_acceptance", **changes, **accepted),
        recipe("demo_vispec", "vispec_steps", **changes, **steps),
        recipe("demo_vispec", "vispec_vocabulary", **changes, **tokens),
        recipe("demo_vispec", "vispec_plus", **changes, **taps, **accepted, **steps, **tokens),
    ]


def baselines() -> Sequence[Recipe]:
    """One epoch more of the heads that ViSpec is compared with: as they were, and with multi-step runs."""
    changes = {"steps": 184, "learning_rate": 3e-4, "seed": 2}
    recipes = []
    for method in ("eagle2", "eaglevlm"):
        start = changes | {"init_from": f"runs/demo_{method}/export"}
        recipes += [
            recipe(f"demo_{method}", f"{method}_longer", **start),
            recipe(f"demo_{method}", f"{method}_steps", mtp_steps=2, **start),
        ]
    return recipes


def ablation() -> Sequence[Recipe]:
    """ViSpec's parts on what others said in place of the target's own answers."""
    changes = {"mtp_steps": 0, "conversations": "scenes", "max_records": 3072}
    return [
        recipe("demo_vispec", "ablation_adaptor", global_feature=False, **changes),
        recipe("demo_vispec", "ablation_global", **changes),
    ]


GROUPS: dict[str, Callable[[], Sequence[Recipe]]] = {
    "vispec1": lambda: [recipe("demo_vispec1")],
    "lm": lambda: [recipe("demo_lm")],
    "heads": heads,
    "vispec": vispec,
    "improvements": improvements,
    "baselines": baselines,
    "massv1": massv1,
    "massv2": massv2,
    "ablation": ablation,
    "primitives": primitives,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default")
    asked = parser.parse_args().groups or list(GROUPS)
    if unknown := [name for name in asked if name not in GROUPS]:
        parser.error(f"unknown group {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    for name in asked:
        recipes = GROUPS[name]()
        if all(each.export_folder.exists() for each in recipes):
            continue
        print(f"{name}: {', '.join(each.name for each in recipes)}", flush=True)
        try:
            run(*recipes)
        except Stopped as stopped:
            sys.exit(str(stopped))
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
