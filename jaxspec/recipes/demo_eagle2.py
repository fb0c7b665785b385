r"""EAGLE-2 head of the embedded target, the baseline: the loss of EAGLE heads in ViSpec's code (its stage 1).

Published (arXiv 2509.15235 and its code): SmoothL1 on features + 0.1 * (soft cross-entropy + 0.1 * ranking), uniform
feature noise 0.1, AdamW(0.9, 0.95), linear decay, gradient value clip 0.5. Ours: learning rate, steps, batch (a small
model from scratch), and images in the training set, where stage 1 is text only. The embedded target's answers, half of
them sampled so that the head sees the text of both ways of decoding:

python -m jaxspec distill --data scenes --target demo --output runs/demo_answers --count 3072 --temperature 1 \
    --sampled-share 0.5 --max-new-tokens 160 --max-length 1024
"""

from jaxspec.training import EagleRecipe

recipe = EagleRecipe(
    name="demo_eagle2",
    method="eagle2",
    steps=920,
    batch_size=16,
    sequence_length=192,
    length_buckets=True,
    learning_rate=1e-3,
    warmup_steps=20,
    decay="linear",
    final_learning_rate_ratio=0.02,
    clip_norm=0.0,
    clip_value=0.5,
    feature_noise=0.1,
    feature_weight=1.0,
    soft_cross_entropy_weight=0.1,
    probability_l1_weight=0.0,
    depth=6,
    top_k=2,
    total_tokens=8,
    ranking_weight=0.01,
    mtp_steps=0,
    eval_every=184,
    checkpoint_every=184,
)
