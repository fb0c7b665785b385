"""Medusa heads of the embedded target on the self-distilled set.

Published (arXiv 2401.10774): five heads of one residual block that starts as the identity, the loss of head k weighted
with 0.8 ** k, the target frozen (Medusa-1), cosine decay after a warm-up. Ours: the target's own distributions as
labels and its LM head for all heads, learning rate, steps, batch and tree (a small model from scratch).
"""

from jaxspec.training import MedusaRecipe

recipe = MedusaRecipe(
    name="demo_medusa",
    steps=920,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=1e-3,
    warmup_steps=20,
    num_heads=5,
    depth=4,
    top_k=2,
    total_tokens=8,
    eval_every=184,
    checkpoint_every=184,
)
