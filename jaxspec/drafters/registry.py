"""The methods of drafting. A method is one file here and one line in this table."""

from collections.abc import Mapping

import numpy as np

from jaxspec.checkpoints.foreign import eagle3_marks, says_eagle3
from jaxspec.drafters.contract import Method
from jaxspec.drafters.eagle import EAGLE2, EAGLEVLM
from jaxspec.drafters.lookup import LOOKUP
from jaxspec.drafters.massv import MASSV
from jaxspec.drafters.medusa import MEDUSA
from jaxspec.drafters.specvlm import SPECVLM
from jaxspec.drafters.vispec import VISPEC
from jaxspec.targets.registry import FAMILIES

METHODS: dict[str, Method] = {
    "eagle2": EAGLE2,
    "vispec": VISPEC,
    "eaglevlm": EAGLEVLM,
    "specvlm": SPECVLM,
    "massv": MASSV,
    "medusa": MEDUSA,
    "lookup": LOOKUP,
}

WHOLE_MODEL = "model.embed_tokens.weight"
"""A tensor of every Hugging Face causal language model, and of no published head."""


def method_of(raw: dict, tensors: Mapping[str, np.ndarray]) -> str:
    """The name of the method whose config.json this is, beside its tensors.

    Where we wrote it: `jaxspec.method`. Else ViSpec's files are known by their `num_q`, Medusa's by their
    `medusa_num_heads`. A language model of its own is known by its tensors: published heads are called `llama` in
    config.json, too. Raises ValueError for a method that is not known, and by name for an EAGLE-3 head and a whole
    vision-language model.
    """
    if method := raw.get("jaxspec", {}).get("method"):
        name = method
    elif says_eagle3(raw) or eagle3_marks(tensors) or reads_three_features(tensors):
        raise ValueError(f"an EAGLE-3 head is not supported as a drafter; supported: {', '.join(METHODS)}")
    elif (family := FAMILIES.get(str(raw.get("model_type")))) and family.images:
        raise ValueError(f"a whole {family.title} model is not supported as a drafter; supported: {', '.join(METHODS)}")
    elif "medusa_num_heads" in raw:
        name = "medusa"
    elif raw.get("num_q"):
        name = "vispec"
    else:
        name = "massv" if WHOLE_MODEL in tensors else "eagle2"
    if name not in METHODS:
        raise ValueError(f"drafter method {name!r} is not known; known: {', '.join(METHODS)}")
    return name


def reads_three_features(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether `fc` reads three hidden states of the target, as EAGLE-3's does; EAGLE's reads an embedding and one."""
    shape = tensors["fc.weight"].shape if "fc.weight" in tensors else ()
    return len(shape) == 2 and shape[1] == 3 * shape[0]
