"""TPUs that are not there, to compile for: `pip install libtpu`, Python 3.12, jax 0.12."""

import os
from typing import Any

import numpy as np

TOPOLOGIES = {
    "v5e": {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4"},
    "v5p": {1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "v6e": {1: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4"},
}
"""Kind -> chips -> the topology whose first chips are compiled for."""


def chips_of(kind: str, count: int = 1) -> list[Any]:
    """So many chips of a kind. Raises RuntimeError without libtpu."""
    # Read by libtpu when it is loaded, which happens here: it would ask the metadata server of a cloud machine, and
    # take a lock that a second process would wait for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind][count])
    return list(np.array(found.devices).reshape(-1))[:count]
