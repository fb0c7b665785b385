"""ViSpec head of the embedded target: stage 2 of arXiv 2509.15235 on the self-distilled set, from demo_vispec1.

Published: 10 * L1 of the distributions + 0.1 * ranking of the top 10, one multi-step run, num_q 2; for stage 1
AdamW(0.9, 0.95), linear decay and gradient value clip 0.5, which we keep. Ours: learning rate, steps, batch, and num_q
10: a scene has nine places that may each hold another object, so one vector per place and the global one.
"""

from jaxspec.training import ViSpecRecipe

recipe = ViSpecRecipe(
    name="demo_vispec",
    init_from="runs/demo_vispec1/export",
    num_q=10,
    steps=552,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=8e-4,
    warmup_steps=10,
    decay="linear",
    final_learning_rate_ratio=0.02,
    clip_norm=0.0,
    clip_value=0.5,
    probability_l1_weight=10.0,
    depth=6,
    top_k=2,
    total_tokens=8,
    ranking_weight=0.1,
    mtp_steps=1,
    seed=1,
    eval_every=184,
    checkpoint_every=184,
)
