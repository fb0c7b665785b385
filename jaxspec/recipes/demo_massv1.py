"""MASSV drafter of the embedded target, phase 1 (arXiv 2505.10526): only the projector of demo_lm's text model learns.

Published: next-token cross-entropy on image-caption pairs, one epoch, learning rate 1e-3, batch 256 (the numbers from
memory, unconfirmed). Ours: steps and batch, and the target's answers in place of captions.
"""

from jaxspec.training import MassvRecipe

recipe = MassvRecipe(
    name="demo_massv1",
    phase=1,
    lm="runs/demo_lm/export",
    steps=300,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=1e-3,
    warmup_steps=10,
    eval_every=100,
)
