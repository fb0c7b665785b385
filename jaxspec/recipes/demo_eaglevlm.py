"""EagleVLM head of the embedded target: SpecVLM's baseline (arXiv 2509.11815), which sees every image token.

Published: the loss of online-logit distillation, 0.1 * cross-entropy(teacher, student) + SmoothL1(features), AdamW(0.9,
0.95) without weight decay, no warm-up. Ours: learning rate, steps, batch, decay and gradient clip, which are those of
demo_eagle2 so that the two can be compared, and a tree that pays on a CPU (published: 7 / 10 / 60).
"""

from jaxspec.training import EagleRecipe

recipe = EagleRecipe(
    name="demo_eaglevlm",
    method="eaglevlm",
    steps=920,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=1e-3,
    warmup_steps=0,
    decay="linear",
    final_learning_rate_ratio=0.02,
    weight_decay=0.0,
    adam_b2=0.95,
    clip_norm=0.0,
    clip_value=0.5,
    feature_noise=0.0,
    feature_weight=1.0,
    soft_cross_entropy_weight=0.1,
    probability_l1_weight=0.0,
    ranking_weight=0.0,
    mtp_steps=0,
    depth=6,
    top_k=2,
    total_tokens=8,
    eval_every=184,
    checkpoint_every=184,
)
