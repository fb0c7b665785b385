"""ViSpec head of the embedded target: stage 2 of arXiv 2509.15235 on the self-distilled set.

Published: 10 * L1 of the distributions + 0.1 * ranking of the top 10, one multi-step run, num_q 2, AdamW(0.9, 0.95),
linear decay, gradient value clip 0.5. Ours: from scratch (no text-only stage), learning rate, steps, batch: the same as
EAGLE-2's, so that the two are compared at equal training.
"""

from jaxspec.training import DrafterRecipe

recipe = DrafterRecipe(
    name="demo_vispec",
    method="vispec",
    steps=150,
    batch_size=16,
    sequence_length=192,
    learning_rate=1e-3,
    warmup_steps=20,
    decay="linear",
    clip_norm=0.0,
    clip_value=0.5,
    probability_l1_weight=10.0,
    ranking_weight=0.1,
    mtp_steps=1,
    eval_every=50,
)
